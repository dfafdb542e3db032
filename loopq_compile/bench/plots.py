"""The few kinds of pictures that reports need, on matplotlib figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Line = tuple[Sequence[float], Sequence[float | None]]
"""Positions and values."""


def bars(figure: Figure, values: Mapping[str, Mapping[str, float | None]], y: str, base: float | None = None) -> None:
    """Groups of bars; the axis is logarithmic if they differ by more than a factor of ten.

    Args:
        figure: to draw on.
        values: by series and group; None leaves a gap.
        y: what the axis shows.
        base: a horizontal line, such as the value in full precision.
    """
    axes = figure.subplots()
    groups = list(dict.fromkeys(group for series in values.values() for group in series))
    width = 0.8 / max(1, len(values))
    for number, (name, series) in enumerate(values.items()):
        known = {i: value for i, group in enumerate(groups) if (value := series.get(group))}
        axes.bar([i + (number + 0.5) * width - 0.4 for i in known], list(known.values()), width, label=name)
    if base is not None:
        axes.axhline(base, color="black", linestyle=":", linewidth=1, label="full precision")
    heights = [value for series in values.values() for value in series.values() if value]
    if heights and max(heights) > 10 * min(heights):
        axes.set_yscale("log")
    axes.set_xticks(range(len(groups)), groups, rotation=30, ha="right")
    axes.set_ylabel(y)
    axes.legend(fontsize=8)


def stacked(figure: Figure, values: Mapping[str, Mapping[str, float]], y: str) -> None:
    """One bar per entry of `values`, made of its parts."""
    axes = figure.subplots()
    parts = list(dict.fromkeys(part for series in values.values() for part in series))
    bottom = [0.0] * len(values)
    for part in parts:
        heights = [series.get(part, 0.0) for series in values.values()]
        axes.bar(range(len(values)), heights, 0.6, bottom=bottom, label=part)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.set_xticks(range(len(values)), list(values), rotation=20, ha="right")
    axes.set_ylabel(y)
    axes.legend(fontsize=8)


def lines(
    axes: Axes, series: Mapping[str, Line], x: str, y: str, log: bool = True, marks: Sequence[float] = ()
) -> None:
    """Lines, and dotted verticals at `marks`."""
    from matplotlib.ticker import MaxNLocator

    for name, (positions, values) in series.items():
        known = [(p, v) for p, v in zip(positions, values, strict=True) if v is not None]
        axes.plot(
            [p for p, _ in known],
            [v for _, v in known],
            marker="o" if len(known) < 30 else "",
            markersize=4,
            label=name,
        )
    for mark in marks:
        axes.axvline(mark, color="grey", linestyle=":", linewidth=1)
    if log:
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y)
    if series:
        axes.legend(fontsize=8)


def heat(
    figure: Figure,
    axes: Axes,
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    label: str,
    marked: Sequence[tuple[int, int]] = (),
) -> None:
    """A heat map; cells in `marked` get a cross."""
    image = axes.imshow([list(row) for row in values], aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(columns)), list(columns), fontsize=8)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=6 if len(rows) > 12 else 8)
    for row, column in marked:
        axes.plot(column, row, marker="x", color="red", markersize=6)
    bar: Any = figure.colorbar(image, ax=axes)
    bar.set_label(label, fontsize=8)
