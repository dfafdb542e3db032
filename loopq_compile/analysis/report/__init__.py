"""Pages that need no network: a report on the effect of quantization on every loop, and a whole program to browse."""

from loopq_compile.analysis.report.browse import browse
from loopq_compile.analysis.report.measure import measure
from loopq_compile.analysis.report.render import render, trajectory, write, write_page

__all__ = ["browse", "measure", "render", "trajectory", "write", "write_page"]
