"""`loopq-compile bench quality`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from loopq_compile.cli.common import (
    Json,
    Length,
    MaxTokens,
    Stride,
    TextFile,
    TokenizerFile,
    TrustRemoteCode,
    calibration_batches,
    console,
    load,
    names,
    note,
    table,
    text_source,
)
from loopq_compile.errors import LoopQError

app = typer.Typer(no_args_is_help=True, help="Measure methods and schemes against each other.")


@app.callback()
def _group() -> None:
    """Measure methods and schemes against each other."""


@app.command("quality")
def quality_command(
    model: Annotated[
        str, typer.Argument(metavar="[MODEL]", help='"bundled", or a Hugging Face folder or hub id.')
    ] = "bundled",
    schemes: Annotated[str, typer.Option(help="Comma-separated, such as w4a4,w4a8.")] = "w4a4,w4a8",
    methods: Annotated[str, typer.Option(help="Comma-separated, such as symmetric,las.")] = "symmetric,las",
    activations: Annotated[str, typer.Option(help="Comma-separated: static, dynamic.")] = "static,dynamic",
    group_size: Annotated[int, typer.Option(help="Neighbouring features that share a scale; -1 for whole rows.")] = 32,
    text: TextFile = None,
    length: Length = 256,
    stride: Stride = 128,
    max_tokens: MaxTokens = 4096,
    calibration: Annotated[
        str, typer.Option(metavar="FILE", help='UTF-8 text to calibrate on, or "bundled".')
    ] = "bundled",
    samples: Annotated[int, typer.Option(min=1, help="Number of calibration samples.")] = 32,
    sample_length: Annotated[int, typer.Option(min=1, help="Tokens in a calibration sample.")] = 128,
    seed: Annotated[int, typer.Option(help="Which samples are drawn.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Folder for quality.json and quality.md.")
    ] = None,
    tokenizer: TokenizerFile = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Methods by schemes: perplexity, its ratio to full precision, KL divergence, and time.

    Every combination is calibrated on the same samples and measured on the same text.
    """
    from loopq_compile import bench
    from loopq_compile.evaluate import tokenize

    say = note(json)
    runs = bench.variants(names(methods), names(schemes), names(activations), group_size=group_size)
    loaded = load(model, tokenizer, trust_remote_code)
    if loaded.kind != "model":
        raise LoopQError(f"{model} is quantized already; bench quality takes a model in floating point.")
    content, source = text_source(text)
    tokens = tokenize(loaded.tokenizer, content, max_tokens)
    batches = calibration_batches(calibration, loaded.tokenizer, samples, sample_length, seed)
    about: dict[str, Any] = {"model": model, "text": source, "tokens": len(tokens), "length": length, "stride": stride}
    about |= {"calibration": calibration, "samples": samples, "sample_length": sample_length, "seed": seed}
    rows = []
    for row, _ in bench.quality(loaded.model, tokens, runs, batches, length=length, stride=stride):
        rows.append(row)
    if json:
        typer.echo(bench.to_json(rows, **about), nl=False)
    else:
        console().print(table(bench.COLUMNS, [row.cells() for row in rows], text_columns=3))
        say(
            f"\ntext: {source}, first {len(tokens):,} tokens; calibration: {samples} x {sample_length} tokens, "
            f"{calibration}"
        )
    if out is not None:
        for path in bench.write_results(rows, out, f"Quality of {model}", **about):
            say(f"wrote {path}")
