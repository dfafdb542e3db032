"""A report's numbers as one HTML file: inline CSS and SVG, no script, no network, light and dark."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeGuard

import jinja2

from loopq_compile.errors import LoopQError
from loopq_compile.report.measure import Values

WIDTH, HEIGHT, LEFT = 640, 220, 56
"""Of plots, in units of their view box."""


def render(programs: Mapping[str, Values], title: str = "loopq_compile report") -> str:
    """The report as HTML.

    Args:
        programs: what `measure` found, by the name to show.
        title: of the page.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("loopq_compile.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals |= {"cells": cells, "plot": plot}
    environment.filters["short"] = short
    return environment.get_template("report.html.jinja").render(programs=programs, title=title)


def write(file: str | os.PathLike[str], programs: Mapping[str, Values], title: str = "loopq_compile report") -> Path:
    """Writes the report; a file that is there stays until the new one is complete.

    Raises:
        LoopQError: the file cannot be written.
    """
    path = Path(file).expanduser()
    text = render(programs, title)
    beside = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise LoopQError(f"Cannot write {path}: {error.strerror or error}.") from error
    return path


def short(value: float | None) -> str:
    """A number in few characters, "" for None."""
    return "" if value is None else f"{value:.3g}"


def cells(rows: Mapping[str, Sequence[float | None]], relative: bool = False) -> list[Values]:
    """Rows of a heat map.

    Args:
        rows: values by row name.
        relative: shade a row by its own largest value rather than by that of the table.

    Returns:
        `{"name", "cells": [{"text", "shade"}]}` each; shades are percents of the accent colour.
    """
    top = max((abs(v) for values in rows.values() for v in values if _known(v)), default=0.0)
    made = []
    for name, values in rows.items():
        largest = max((abs(v) for v in values if _known(v)), default=0.0) if relative else top
        row = [
            {"text": short(v), "shade": round(85 * abs(v) / largest) if _known(v) and largest else 0} for v in values
        ]
        made.append({"name": name, "cells": row})
    return made


def plot(series: Mapping[str, Sequence[float | None]], marks: Sequence[float] = (), log: bool = True) -> Values:
    """Lines in a plot of `WIDTH` x `HEIGHT`.

    Args:
        series: values by name at positions 0, 1, 2, ...; None and numbers that a logarithm lacks leave gaps.
        marks: positions of dotted verticals, such as loop transitions.
        log: logarithmic vertical axis.

    Returns:
        `{"lines": [{"name", "points", "colour"}], "marks": [x], "ticks": [{"y", "text"}], "width", "height", "left"}`.
    """
    usable = {
        name: {i: v for i, v in enumerate(values) if _known(v) and (v > 0 or not log)}
        for name, values in series.items()
    }
    known = [v for values in usable.values() for v in values.values()]
    low, high = (min(known), max(known)) if known else (1.0, 1.0)
    last = max((len(values) for values in series.values()), default=1) - 1 or 1

    def level(value: float) -> float:
        a, b, v = (math.log10(low), math.log10(high), math.log10(value)) if log else (low, high, value)
        return round(HEIGHT - 14 - (HEIGHT - 28) * ((v - a) / (b - a) if b > a else 0.5), 1)

    def across(position: float) -> float:
        return round(LEFT + (WIDTH - LEFT - 10) * position / last, 1)

    lines = []
    for number, (name, values) in enumerate(usable.items()):
        points = " ".join(f"{across(i)},{level(v)}" for i, v in values.items())
        lines.append({"name": name, "points": points, "colour": number % 6})
    ticks = [{"y": level(v), "text": short(v)} for v in dict.fromkeys((low, high)) if known]
    shape = {"width": WIDTH, "height": HEIGHT, "left": LEFT}
    return {"lines": lines, "marks": [across(mark) for mark in marks], "ticks": ticks, **shape}


def _known(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)
