"""A report's numbers as one HTML file: inline CSS and SVG, no script, no network, light and dark."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeGuard

import jinja2

from loopq_compile.analysis.report.measure import Values
from loopq_compile.analysis.summary import short_names
from loopq_compile.errors import LoopQError
from loopq_compile.storage.atomic import write_text

WIDTH, HEIGHT, LEFT, BOTTOM = 720, 260, 48, 232
"""Sizes of plots, in units of their view box: total, and where the frame begins and ends."""


def render(programs: Mapping[str, Values], title: str = "loopq_compile report") -> str:
    """The report as HTML.

    Args:
        programs: what `measure` found, by the name to show.
        title: title of the page.
    """
    helpers = {"along": along, "cells": cells, "curves": curves, "plot": plot, "selection": selection}
    return fill("report.html.jinja", programs=programs, title=title, **helpers)


def trajectory(programs: Mapping[str, Values]) -> str:
    """Only the error along the trajectory, as an SVG picture.

    Args:
        programs: what `measure` found with the model, by the name to show.

    Raises:
        LoopQError: nothing was measured.
    """
    points = [found["points"] for found in programs.values() if found.get("points")]
    if not points:
        raise LoopQError("A picture of errors needs the model and tokens: give --model.")
    errors = {name: [p["error"] for p in found["points"]] for name, found in programs.items() if found.get("points")}
    return fill(
        "trajectory.svg.jinja",
        title="Relative error of the residual stream along the loops",
        drawn=plot(errors, **along(points[0])),
    )


def fill(template: str, **values: object) -> str:
    """Fills a template of this folder with values; all values are escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("loopq_compile.analysis.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["short"] = short
    return environment.get_template(template).render(**values)


def write(file: str | os.PathLike[str], programs: Mapping[str, Values], title: str = "loopq_compile report") -> Path:
    """Writes the report; see `write_page`."""
    return write_page(file, render(programs, title))


def write_page(file: str | os.PathLike[str], text: str) -> Path:
    """Writes a page; an existing file stays until the new one is complete.

    Raises:
        LoopQError: the file cannot be written.
    """
    return write_text(file, text)


def short(value: float | None) -> str:
    """A number in few characters, "" for None."""
    return "" if value is None else f"{value:.3g}"


def cells(rows: Mapping[str, Sequence[float | None]], relative: bool = False) -> Values:
    """A heat map.

    Args:
        rows: values by module or group.
        relative: whether to shade a row by its own largest value instead of the table's.

    Returns:
        `{"rows": [{"name", "short", "cells": [{"text", "shade"}]}], "top", "relative"}`; shades are percents of the
        accent colour, 85 for the largest value, which `top` gives as text. A row with one value holds for all loops.
    """
    top = max((abs(v) for values in rows.values() for v in values if _known(v)), default=0.0)
    made = []
    for (name, values), less in zip(rows.items(), short_names(list(rows)), strict=True):
        largest = max((abs(v) for v in values if _known(v)), default=0.0) if relative else top
        row = [
            {"text": short(v), "shade": round(85 * abs(v) / largest) if _known(v) and largest else 0} for v in values
        ]
        made.append({"name": name, "short": less, "cells": row})
    return {"rows": made, "top": short(top), "relative": relative}


def selection(rounds: Sequence[Mapping[str, float]], selected: Sequence[str]) -> Values:
    """The heat map of scores by which groups were chosen, one column per round, and the chosen groups (figure 3)."""
    groups = dict.fromkeys([*(group for scores in rounds for group in scores), *selected])
    heat = cells({group: [scores.get(group) for scores in rounds] for group in groups})
    for row in heat["rows"]:
        row["marked"] = row["name"] in selected
    return heat | {"columns": [f"round {i + 1}" for i in range(len(rounds))]}


def curves(phases: Sequence[Sequence[Values]]) -> Values:
    """The plot of a calibration: divergence on held-out text by step, phases one after the other, one line each."""
    at: list[float] = []
    series: dict[str, list[float | None]] = {}
    labels: dict[float, str] = {}
    for number, phase in enumerate(phases, 1):
        start = at[-1] if at else 0
        labels[start] = f"step {start}"
        series[f"phase {number}"] = [*[None] * len(at), *(entry["validation"] for entry in phase)]
        at += [start + entry["step"] for entry in phase]
    return plot(series, marks=list(labels)[1:], log=False, at=at, labels=labels | {at[-1]: str(at[-1])})


def plot(
    series: Mapping[str, Sequence[float | None]],
    marks: Sequence[float] = (),
    log: bool = True,
    at: Sequence[float] | None = None,
    labels: Mapping[float, str] | None = None,
) -> Values:
    """Lines in a plot of `WIDTH` x `HEIGHT`.

    Args:
        series: values by name; None and numbers without a logarithm leave gaps.
        marks: positions of dotted verticals, such as loop transitions.
        log: logarithmic vertical axis.
        at: positions of values, by default 0, 1, 2, ...
        labels: texts below the plot, by position.

    Returns:
        `{"lines": [{"name", "points", "dots": [{"x", "y", "text"}], "colour", "dashed"}], "marks": [x], "ticks": [{"y",
        "text"}], "labels": [{"x", "text"}], "width", "height", "left", "bottom"}`.
    """
    at = at or range(max((len(values) for values in series.values()), default=0))
    usable = {
        name: {x: v for x, v in zip(at, values, strict=False) if _known(v) and (v > 0 or not log)}
        for name, values in series.items()
    }
    known = [v for values in usable.values() for v in values.values()]
    low, high = (min(known), max(known)) if known else (1.0, 1.0)
    if low == high:
        low, high = low - abs(low) / 2, high + abs(high) / 2
    first, last = (min(at), max(at)) if at else (0, 0)

    def level(value: float) -> float:
        a, b, v = (math.log10(low), math.log10(high), math.log10(value)) if log else (low, high, value)
        return round(BOTTOM - 8 - (BOTTOM - 20) * ((v - a) / (b - a) if b > a else 0.5), 1)

    def across(position: float) -> float:
        return round(LEFT + 8 + (WIDTH - LEFT - 20) * ((position - first) / (last - first) if last > first else 0.5), 1)

    lines = []
    for number, (name, values) in enumerate(usable.items()):
        dots = [{"x": across(x), "y": level(v), "text": f"{name}: {short(v)}"} for x, v in values.items()]
        points = " ".join(f"{dot['x']},{dot['y']}" for dot in dots)
        lines.append({"name": name, "points": points, "dots": dots, "colour": number % 6, "dashed": number >= 6})
    ticks = [{"y": level(v), "text": f"{v:.6g}"} for v in _ticks(low, high, log)] if known else []
    under = [{"x": across(x), "text": text} for x, text in (labels or {}).items()]
    shape = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "bottom": BOTTOM}
    return {"lines": lines, "marks": [across(mark) for mark in marks], "ticks": ticks, "labels": under, **shape}


def along(points: Sequence[Values]) -> Values:
    """Where loops begin and end along a trajectory, as `marks` and `labels` of a plot."""
    marks: list[float] = [i - 0.5 for i, (a, b) in enumerate(itertools.pairwise(points), 1) if a["loop"] != b["loop"]]
    edges = [-0.5, *marks, len(points) - 0.5]
    labels = {}
    for start, end in itertools.pairwise(edges):
        loop = points[round(start + 0.5)]["loop"]
        if loop is not None:
            labels[(start + end) / 2] = f"loop {loop}" if len(edges) < 12 else str(loop)
    return {"marks": marks, "labels": labels}


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """Round numbers between `low` and `high`: at most about six, and at least both ends."""
    step = 10.0 ** math.floor(math.log10(high - low)) if high > low else abs(high) or 1.0
    sizes = [step * m for m in (0.25, 0.5, 1, 2)]
    choices = [[size * (math.ceil(low / size) + i) for i in range(12)] for size in sizes]
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        fine = [[m * 10.0**e for e in decades for m in kinds] for kinds in ((1, 2, 5), (1, 3), (1,))]
        coarse = [[10.0**e for e in decades if e % every == 0] for every in (2, 3, 5, 10)]
        choices = [*fine, *coarse, *choices]
    for choice in choices:
        inside = [v for v in choice if low <= v <= high]
        if 2 <= len(inside) <= 6:
            return inside
    return [low, high]


def _known(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)
