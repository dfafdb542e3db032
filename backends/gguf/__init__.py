"""GGUF files for llama.cpp; see README.md. The package `gguf` is needed: pip install 'loopq-compile[gguf]'."""

from __future__ import annotations

from loopq_compile.backends.gguf.exporter import GgufExport, export

__all__ = ["GgufExport", "export"]
