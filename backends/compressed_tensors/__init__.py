"""Folders of transformers in the format of compressed-tensors, for transformers and vLLM; see README.md."""

from __future__ import annotations

from loopq_compile.backends.compressed_tensors.exporter import HuggingFaceExport, export

__all__ = ["HuggingFaceExport", "export"]
