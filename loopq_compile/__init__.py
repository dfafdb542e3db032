"""A compiler that quantizes looped language models.

`compile` captures a model and quantizes it, `load` reads a saved program. Names are imported on first use.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopq_compile._version import __version__ as __version__

if TYPE_CHECKING:
    from loopq_compile import methods as pipelines
    from loopq_compile.compiler import compile, load
    from loopq_compile.errors import CaptureError, LoopQError
    from loopq_compile.generation.speculation import Speculation
    from loopq_compile.graph.loops import LoopStructure
    from loopq_compile.graph.scheme import Scheme
    from loopq_compile.pipeline import Pipeline
    from loopq_compile.program import Program
    from loopq_compile.sources.auto_classes import register_with_transformers

if not Path(__file__).with_name("passes").is_dir():
    # A checkout that nobody installed: `passes/` and `backends/` lie beside this folder (see pyproject.toml).
    __path__.append(str(Path(__file__).parents[1]))

_HOMES = {
    "CaptureError": "errors",
    "LoopQError": "errors",
    "LoopStructure": "graph.loops",
    "Pipeline": "pipeline",
    "Program": "program",
    "Scheme": "graph.scheme",
    "Speculation": "generation.speculation",
    "compile": "compiler",
    "load": "compiler",
    "register_with_transformers": "sources.auto_classes",
}

__all__ = [
    "CaptureError",
    "LoopQError",
    "LoopStructure",
    "Pipeline",
    "Program",
    "Scheme",
    "Speculation",
    "compile",
    "load",
    "pipelines",
    "register_with_transformers",
]


def __getattr__(name: str) -> Any:
    if name == "pipelines":
        return importlib.import_module("loopq_compile.methods")
    if name in _HOMES:
        return getattr(importlib.import_module(f"loopq_compile.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'loopq_compile' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
