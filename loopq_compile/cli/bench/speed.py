"""`loopq-compile bench speed`."""

from __future__ import annotations

from typing import Annotated

import typer

from loopq_compile.cli.bench.options import Model, Out, Schemes, load_model, show
from loopq_compile.cli.common import AllowPickle, Json, RepeatLayers, TrustRemoteCode, names, note, whole_numbers


def speed_command(
    model: Model = "bundled",
    repeat: RepeatLayers = None,
    schemes: Schemes = "w4a16,w4a8,w4a4",
    methods: Annotated[
        str, typer.Option("--methods", help="That need no data: symmetric; quarot shows what transforms cost.")
    ] = "symmetric",
    forms: Annotated[str, typer.Option("--forms", help="Of the export: unrolled, rolled.")] = "unrolled",
    heads: Annotated[
        str, typer.Option("--head-bits", metavar="LIST", help="Of quantized files: 0 for a head in floating point.")
    ] = "0,8",
    prefill: Annotated[str, typer.Option("--prefill", metavar="LIST", help="Lengths of prompts.")] = "128,512",
    decode: Annotated[str, typer.Option("--decode", metavar="LIST", help="Batch sizes of decoding.")] = "1,8",
    context: Annotated[int, typer.Option("--context", min=1, help="Tokens in the cache when decoding begins.")] = 128,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Tokens decoded in a run.")] = 16,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Runs, of which the fastest counts.")] = 3,
    pytorch: Annotated[
        str, typer.Option("--pytorch", metavar="LIST", help="Types in which PyTorch runs the model.")
    ] = "float32,bfloat16",
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    out: Out = None,
    json: Json = False,
) -> None:
    """Tokens a second for prompts and for decoding: PyTorch, ONNX Runtime in full precision, and quantized files.

    All with a key-value cache, in one thread, each in a process of its own.

    Example: loopq-compile bench speed smollm2 --repeat 12-15x3
    """
    from loopq_compile.bench.speed import speed
    from loopq_compile.bench.speed_session import Job

    name = f"{model}@{repeat}" if repeat else model
    loaded = load_model(model, None, trust_remote_code, repeat, allow_pickle).model
    lengths, batches = (whole_numbers(*pair) for pair in (("--prefill", prefill), ("--decode", decode)))
    job = Job(
        name,
        prefill=tuple(lengths),
        decode=tuple(batches),
        context=context,
        steps=steps,
        repeats=repeats,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
    bits = [number or None for number in whole_numbers("--head-bits", heads)]
    report = speed(
        name,
        loaded,
        names(schemes),
        names(forms),
        job,
        bits,
        names(pytorch),
        names(methods),
        say=note(True),
    )
    show(report, out, json, model=name)
