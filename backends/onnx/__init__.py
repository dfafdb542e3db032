"""The ONNX backend: `export` writes a program to a file, `OnnxExecutable` runs such a file, `lower` does both;
`write_genai_config` is for onnxruntime-genai.

Steps of an export, one module each: `prepare` (a private copy of the graph), `flatten` (operators that torch.onnx
knows, and opaque ones), `translate` (ATen to ONNX, by torch.onnx), `lowering` (a list of what opaque nodes become in
each target), `write`. Another target is another list in `lowering`.
"""

from __future__ import annotations

import tempfile
import weakref
from pathlib import Path
from typing import Any

from loopq_compile.backends.onnx.executable import OnnxExecutable
from loopq_compile.backends.onnx.exporter import export
from loopq_compile.backends.onnx.genai import write_genai_config
from loopq_compile.backends.onnx.overview import OnnxExport

__all__ = ["OnnxExecutable", "OnnxExport", "export", "lower", "write_genai_config"]


def lower(program: Any, *, threads: int | None = None, optimize: bool = True, **options: Any) -> OnnxExecutable:
    """Exports a `Program` (or a graph module) to a temporary folder and opens it in ONNX Runtime.

    Args:
        program: what to lower.
        threads, optimize: as in `OnnxExecutable`.
        options: as in `export`. The folder is deleted with the executable.

    Raises:
        LoopQError: as in `export` and `OnnxExecutable`.
    """
    folder = tempfile.TemporaryDirectory(prefix="loopq-onnx-")
    try:
        report = export(getattr(program, "graph_module", program), Path(folder.name), **options)
        executable = OnnxExecutable(report.path, threads=threads, optimize=optimize)
    except BaseException:
        folder.cleanup()
        raise
    weakref.finalize(executable, folder.cleanup)
    return executable
