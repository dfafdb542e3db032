"""`loopq-compile bench loops` and `bench compile`: how files and compiling grow with loops and layers."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from loopq_compile.cli.bench.options import Model, Out, load_model, show, whole_numbers
from loopq_compile.cli.common import Json, names
from loopq_compile.errors import LoopQError


def loops_command(
    model: Model = "bundled",
    repeat: Annotated[
        str | None,
        typer.Option("--repeat", metavar="FIRST-LAST", help="Layers of a Hugging Face model that run as often."),
    ] = None,
    values: Annotated[str, typer.Option("--values", metavar="LIST", help="Numbers of loops.")] = "2,4,8,16",
    scheme: Annotated[str, typer.Option("--scheme", help="Weights are rounded to nearest, without data.")] = "w4a8",
    length: Annotated[int, typer.Option("--length", min=1, help="Tokens of the call that is timed.")] = 16,
    targets: Annotated[str, typer.Option("--targets", help="Of the export.")] = "qdq,onnxruntime",
    out: Out = None,
    json: Json = False,
) -> None:
    """How exported files grow with the number of loops: nodes, bytes, time to open, memory, time of a call."""
    from loopq_compile.bench.loops import growth
    from loopq_compile.scheme import Scheme

    def with_loops(count: int) -> Any:
        loaded = load_model(model, None, False, f"{repeat}x{count}" if repeat else None).model
        if repeat is None:
            if not hasattr(loaded, "loops"):
                raise LoopQError(f"{model} has no number of loops to set; name layers to repeat: --repeat FIRST-LAST.")
            loaded.loops = count
        return loaded

    report = growth(with_loops, whole_numbers("--values", values), Scheme.parse(scheme), length, names(targets))
    show(report, out, json, model=f"{model}@{repeat}" if repeat else model)


def compile_command(
    values: Annotated[
        str, typer.Option("--values", metavar="LIST", help="Layers x loops, by rising number of layer calls.")
    ] = "4x4,8x8,16x16,32x32",
    method: Annotated[str, typer.Option("--method", help="Whose passes are measured.")] = "symmetric",
    scheme: Annotated[str, typer.Option("--scheme", help="Of the program.")] = "w4a4",
    export: Annotated[bool, typer.Option("--export", help="Also measure the ONNX files, target qdq.")] = False,
    out: Out = None,
    json: Json = False,
) -> None:
    """What compiling costs by number of layer calls: seconds of every pass, and the exponent by which they grow."""
    from loopq_compile.bench.compile import compile_growth
    from loopq_compile.scheme import Scheme

    sizes = []
    for part in names(values):
        layers, _, loops = part.partition("x")
        if not (layers.isdigit() and loops.isdigit() and int(layers) and int(loops)):
            raise LoopQError(f"--values takes layers x loops, such as 4x4,8x8; got {values!r}.")
        sizes.append((int(layers), int(loops)))
    if not sizes:
        raise LoopQError("--values names no size; write for instance 4x4,8x8.")
    show(compile_growth(sizes, method, Scheme.parse(scheme), export), out, json, method=method, scheme=scheme)
