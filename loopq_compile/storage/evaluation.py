"""Figures that `loopq-compile eval --save` measured for a saved program, beside it, for model cards.

The file names the program by the SHA-256 of its description, which has the hash of its weights. Figures of another
program in the same folder are therefore never read.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loopq_compile.errors import LoopQError
from loopq_compile.graph.state import Figure
from loopq_compile.storage.atomic import add_files
from loopq_compile.storage.manifest import PROGRAM, digest, read_json

FILE = "evaluation.json"
_GRAPH_FILE = "program.json"


def add_figures(directory: str | os.PathLike[str], figures: Iterable[Figure]) -> list[Figure]:
    """Adds figures to those of a saved program, and returns all; newer ones of the same measurement take the place of
    older ones.

    Raises:
        LoopQError: the folder cannot be written.
    """
    folder = Path(directory)
    found = {(x.data, x.metric, x.details): x for x in [*read_figures(folder), *figures]}
    content = {"program": digest(folder / _GRAPH_FILE)[1], "figures": [asdict(x) for x in found.values()]}
    add_files(folder, PROGRAM, {FILE: json.dumps(content, indent=1) + "\n"})
    return list(found.values())


def read_figures(directory: Path) -> list[Figure]:
    """The figures of the program in this folder; none if there are none, or they belong to another program."""
    with contextlib.suppress(LoopQError, OSError, KeyError, TypeError, ValueError):
        content = read_json(directory / FILE)
        if content["program"] == digest(directory / _GRAPH_FILE)[1]:
            return [_figure(given) for given in content["figures"]]
    return []


def _figure(given: Any) -> Figure:
    """A figure from an untrusted file.

    Raises:
        ValueError: it is none.
    """
    found = Figure(given["data"], given["metric"], given["details"], float(given["value"]))
    if not math.isfinite(found.value) or not all(isinstance(x, str) for x in (found.data, found.metric, found.details)):
        raise ValueError("no figure")
    return found
