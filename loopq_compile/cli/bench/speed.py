"""`loopq-compile bench speed`."""

from __future__ import annotations

from typing import Annotated

import typer

from loopq_compile.cli.bench.options import Fresh, GroupSize, Model, Out, Schemes, load_model, show, text_tokens
from loopq_compile.cli.common import AllowPickle, Json, RepeatLayers, TrustRemoteCode, names, note, whole_numbers
from loopq_compile.errors import LoopQError


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
    products: Annotated[
        str, typer.Option("--products", help="Of the export: packed; int8 and both where activations are quantized.")
    ] = "packed,both",
    group_size: GroupSize = 32,
    prefill: Annotated[str, typer.Option("--prefill", metavar="LIST", help="Lengths of prompts.")] = "128,512",
    decode: Annotated[str, typer.Option("--decode", metavar="LIST", help="Batch sizes of decoding.")] = "1,8",
    context: Annotated[int, typer.Option("--context", min=1, help="Tokens in the cache when decoding begins.")] = 128,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Tokens decoded in a run.")] = 16,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Runs, of which the fastest counts.")] = 3,
    pytorch: Annotated[
        str,
        typer.Option(
            "--pytorch",
            metavar="LIST",
            help="Ways in which PyTorch runs the model: float32, bfloat16, compiled (torch.compile, float32), torchao "
            "(4-bit weights, 8-bit activations, compiled).",
        ),
    ] = "float32,bfloat16,compiled,torchao",
    programs: Annotated[
        str,
        typer.Option("--programs", metavar="LIST", help="Folders of saved programs of this model, to measure as well."),
    ] = "",
    rivals: Annotated[
        str,
        typer.Option(
            "--rivals",
            metavar="LIST",
            help="Other engines: openvino (int4 weights by NNCF, default and float32), llamacpp (Q4_0).",
        ),
    ] = "",
    turns: Annotated[
        int, typer.Option("--turns", min=1, help="How often all rows are measured, by turns; the best counts.")
    ] = 1,
    kl_tokens: Annotated[
        int | None,
        typer.Option(
            "--kl-tokens",
            min=0,
            max=8192,
            help="Tokens of text on which rows are compared with the float32 model; by default 2048 with --rivals.",
        ),
    ] = None,
    text: Annotated[
        str | None, typer.Option("--text", metavar="FILE", help="Text for KL; by default the bundled held-out one.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option("--layers", min=1, help="Of ouro-1.4b and ouro-2.6b: fewer layers, to try it out.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    out: Out = None,
    fresh: Fresh = False,
    json: Json = False,
) -> None:
    """Tokens a second for prompts and for decoding: PyTorch, ONNX Runtime in full precision, quantized files, rivals.

    All with a key-value cache, in one thread, each in a separate process. ouro-1.4b and ouro-2.6b are models of
    published size with random weights. With --out, finished rows are kept, and an interrupted run continues.

    Example: loopq-compile bench speed smollm2 --repeat 12-15x3 --rivals openvino,llamacpp --turns 2
    """
    from loopq_compile.bench.cells import Cells
    from loopq_compile.bench.random_models import SIZES, sized
    from loopq_compile.bench.speed import speed
    from loopq_compile.bench.speed_session import Job

    if model not in SIZES and layers is not None:
        raise LoopQError(f"--layers is for models with random weights: {', '.join(SIZES)}.")
    if model in SIZES and repeat is not None:
        raise LoopQError(f"--repeat is for Hugging Face models; {model} has loops.")
    if model in SIZES and (kl_tokens or text):
        raise LoopQError(
            f"{model} has random weights, so KL on a text means nothing; leave out --kl-tokens and --text."
        )
    count = 0 if model in SIZES else kl_tokens if kl_tokens is not None else 2048 if rivals or text else 0
    ids, source = _text(model, repeat, trust_remote_code, allow_pickle, text, count)
    job = Job(
        f"{model}@{repeat}" if repeat else model,
        config=sized(model, layers).to_dict() if model in SIZES else None,
        prefill=tuple(whole_numbers("--prefill", prefill)),
        decode=tuple(whole_numbers("--decode", decode)),
        context=context,
        steps=steps,
        repeats=repeats,
        text=ids,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
    bits = [number or None for number in whole_numbers("--head-bits", heads)]
    cells = Cells(out / "cells" if out else None, fresh)
    ways = names(pytorch)
    made = names(schemes), names(forms), bits, ways, names(methods), names(products), group_size
    report = speed(job, *made, programs=names(programs), rivals=names(rivals), turns=turns, cells=cells, say=note(True))
    show(report, out, json, model=job.model, **({"text": source} if ids else {}))


def _text(
    model: str, repeat: str | None, trust: bool, pickle: bool, text: str | None, count: int
) -> tuple[tuple[int, ...], str]:
    """Ids of the first tokens of a text, and where it is from. A bad model is refused now, and released again."""
    from loopq_compile.bench.random_models import SIZES

    if model in SIZES:
        return (), ""
    loaded = load_model(model, None, trust, repeat, pickle)
    if not count:
        return (), ""
    tokens, source = text_tokens(loaded, text, count)
    return tuple(tokens.tolist()), source
