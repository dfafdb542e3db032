"""A report on one program or several: what quantization did to every loop, as one HTML file that needs no network."""

from loopq_compile.report.measure import measure
from loopq_compile.report.render import render, write

__all__ = ["measure", "render", "write"]
