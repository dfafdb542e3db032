"""`loopq-compile bench kernels`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loopq_compile.cli.bench.options import Fresh, GroupSize, Out, show
from loopq_compile.cli.common import Json, load, note, whole_numbers
from loopq_compile.errors import LoopQError


def kernels_command(
    program: Annotated[
        str | None, typer.Argument(metavar="[DIR]", help="A compiled program, whose decoding is timed too.")
    ] = None,
    static: Annotated[
        bool, typer.Option("--static", help="Compile without a GPU: registers, spills, shared memory, instructions.")
    ] = False,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune",
            help="Try all tiles on this GPU first, and keep the fastest for this machine; with --static, choose tiles "
            "from what they need and write them into --out, which takes many minutes.",
        ),
    ] = False,
    grid: Annotated[
        bool, typer.Option("--grid", help="With --static: every tile of the tuning grid; takes many minutes.")
    ] = False,
    group_size: GroupSize = 32,
    architectures: Annotated[
        str, typer.Option("--sm", metavar="LIST", help="With --static: compute capabilities such as 80,90.")
    ] = "",
    only: Annotated[
        str, typer.Option("--only", metavar="NAME", help="With --static: kernels whose name contains NAME.")
    ] = "",
    rows: Annotated[str, typer.Option("--rows", metavar="LIST", help="Numbers of tokens to time.")] = "1,16,512,4096",
    batches: Annotated[str, typer.Option("--decode", metavar="LIST", help="Batch sizes of decoding.")] = "1,8",
    caches: Annotated[
        str, typer.Option("--kv-bits", metavar="LIST", help="Caches of decoding: 8, 4, or 0 for floating point.")
    ] = "0,8",
    out: Out = None,
    fresh: Fresh = False,
    json: Json = False,
) -> None:
    """The Triton kernels: timed on a GPU; or, with --static, what each architecture needs, and an estimate.

    Timed against cuBLAS in bfloat16, torch._int_mm and, where it is installed, torchao. With --out, the same command
    continues an interrupted run. --static exits with status 1 if a kernel spills registers, does not fit, or
    misses its tensor-core instruction.
    """
    if static and tune:
        _choose(whole_numbers("--sm", architectures), out, json)
        return
    if static:
        _static(whole_numbers("--sm", architectures), grid, only, group_size, out, json)
        return
    if grid or architectures or only:
        raise LoopQError("--grid, --sm and --only go with --static.")
    numbers = [whole_numbers(*given) for given in (("--rows", rows), ("--decode", batches), ("--kv-bits", caches))]
    _timed(program, numbers[0], numbers[1], numbers[2], group_size, tune, out, fresh, json)


def _static(architectures: list[int], grid: bool, only: str, group_size: int, out: Path | None, json: bool) -> None:
    from loopq_compile.bench.kernels import estimate_report, static_report

    report, estimate = static_report(architectures, grid, only, group_size), estimate_report(group_size)
    if json:
        report.data |= {"estimates": estimate.data}
        report.notes += estimate.notes
        show(report, out, json)
    else:
        show(report, out, json)
        show(estimate, out, json)
    if report.data["failed"]:
        raise typer.Exit(1)


def _choose(architectures: list[int], out: Path | None, json: bool) -> None:
    from loopq_compile.backends.triton.ahead import ARCHITECTURES
    from loopq_compile.backends.triton.configurations import write_table
    from loopq_compile.bench.kernel_choice import choose, compile_grid

    if out is None:
        raise LoopQError("--static --tune writes tiles.json into the folder of --out.")
    found = choose(compile_grid(architectures or ARCHITECTURES))
    write_table(out / "tiles.json", found, "chosen from registers and shared memory of compiled kernels; not measured")
    note(json)(f"wrote {out / 'tiles.json'}")


def _timed(
    program: str | None,
    rows: list[int],
    batches: list[int],
    caches: list[int],
    group_size: int,
    tune: bool,
    out: Path | None,
    fresh: bool,
    json: bool,
) -> None:
    from loopq_compile.backends.triton.configurations import user_table, write_table
    from loopq_compile.bench import kernel_times
    from loopq_compile.bench.cells import Cells

    gpu, say = kernel_times.check_gpu(), note(json)
    if tune:
        found = kernel_times.tune(kernel_times.architecture(), group_size=group_size, say=say)
        write_table(user_table(), found, f"measured on {gpu}")
        say(f"wrote {user_table()}")
    cells = Cells(out and out / "cells", fresh)
    report = kernel_times.time_products(gpu, cells, group_size=group_size, rows=rows, say=say)
    if program is not None:
        loaded = load(program)
        if loaded.kind != "program":
            raise LoopQError(f"{program} is not a compiled program; run `loopq-compile compile` first.")
        lines = [
            kernel_times.time_decoding(loaded.model, batch=batch, kv_bits=bits or None)
            for bits in caches
            for batch in batches
        ]
        decoding = kernel_times.decoding_report(gpu, program, lines)
        report.data["decoding"] = decoding.data
        if not json:
            show(decoding, out, json)
    show(report, out, json)
