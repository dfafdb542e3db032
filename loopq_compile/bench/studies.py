"""All reports by name."""

from __future__ import annotations

from collections.abc import Callable

from loopq_compile.bench import figures, sweeps, tables
from loopq_compile.bench.results import Report
from loopq_compile.bench.settings import Selection
from loopq_compile.bench.study import Study

REPORTS: dict[str, Callable[[Study, Selection], Report]] = {
    "table1": tables.table1,
    "table2": tables.table2,
    "table5": tables.table5,
    "solvers": tables.solvers,
    "fig1": figures.fig1,
    "fig2": figures.fig2,
    "fig3": figures.fig3,
    "fig4": sweeps.fig4,
    "fig5": sweeps.fig5,
    "fig6": sweeps.fig6,
    "budget": sweeps.budget,
}
"""Each takes a study and a selection of runs, measures what is missing, and returns the report."""
