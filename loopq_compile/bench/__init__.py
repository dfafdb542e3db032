"""Compares methods: a quick table (`quality`), and the tables and figures of the LoopQ paper.

`study` quantizes and measures one setting after the other and stores each in a file (`cells`). `tables` and `figures`
say which settings make up a table or figure, and turn them into a `Report` (module `results`), which writes itself.
"""

from loopq_compile.bench.quality import (
    COLUMNS,
    FULL_PRECISION,
    QualityRow,
    Variant,
    quality,
    to_json,
    to_markdown,
    variants,
    write_results,
)

__all__ = [
    "COLUMNS",
    "FULL_PRECISION",
    "QualityRow",
    "Variant",
    "quality",
    "to_json",
    "to_markdown",
    "variants",
    "write_results",
]
