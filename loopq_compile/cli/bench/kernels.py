"""`loopq-compile bench kernels`."""

from __future__ import annotations

from typing import Annotated

import typer

from loopq_compile.cli.bench.options import Out, show, whole_numbers
from loopq_compile.cli.common import Json
from loopq_compile.errors import LoopQError


def kernels_command(
    static: Annotated[
        bool, typer.Option("--static", help="Compile without a GPU: registers, spills, shared memory, instructions.")
    ] = False,
    grid: Annotated[bool, typer.Option("--grid", help="Every tile of the tuning grid; takes many minutes.")] = False,
    architectures: Annotated[
        str, typer.Option("--sm", metavar="LIST", help="Compute capabilities such as 80,90; all by default.")
    ] = "",
    only: Annotated[str, typer.Option("--only", metavar="NAME", help="Kernels whose name contains NAME.")] = "",
    out: Out = None,
    json: Json = False,
) -> None:
    """The Triton kernels: what they need of each GPU architecture, and a roofline estimate from data sheets.

    Exits with status 1 if a kernel spills registers, does not fit, or misses its tensor-core instruction.
    """
    from loopq_compile.bench.kernels import estimate_report, static_report

    if not static:
        raise LoopQError("Kernels are not timed in this version; --static compiles them without a GPU and estimates.")
    report, estimate = static_report(whole_numbers("--sm", architectures), grid, only), estimate_report()
    if json:
        report.data |= {"estimates": estimate.data}
        report.notes += estimate.notes
        show(report, out, json)
    else:
        show(report, out, json)
        show(estimate, out, json)
    if report.data["failed"]:
        raise typer.Exit(1)
