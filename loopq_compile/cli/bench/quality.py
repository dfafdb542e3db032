"""`loopq-compile bench quality`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from loopq_compile.cli.bench.options import (
    Activations,
    GroupSize,
    Methods,
    Model,
    Out,
    SampleLength,
    Samples,
    Schemes,
    load_model,
    text_tokens,
)
from loopq_compile.cli.common import (
    AllowPickle,
    CalibrationText,
    Device,
    Dtype,
    Json,
    Length,
    MaxTokens,
    RepeatLayers,
    Stride,
    TextFile,
    TokenizerFile,
    TrustRemoteCode,
    calibration_batches,
    check_text,
    console,
    names,
    note,
    table,
)


def quality_command(
    model: Model = "bundled",
    schemes: Schemes = "w4a4,w4a8",
    methods: Methods = "symmetric,las",
    activations: Activations = "static,dynamic",
    group_size: GroupSize = 32,
    text: TextFile = None,
    length: Length = 256,
    stride: Stride = 128,
    max_tokens: MaxTokens = 4096,
    calibration: CalibrationText = "docs",
    samples: Samples = 32,
    sample_length: SampleLength = 128,
    seed: Annotated[int, typer.Option(help="Which samples are drawn.")] = 0,
    out: Out = None,
    repeat: RepeatLayers = None,
    tokenizer: TokenizerFile = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    dtype: Dtype = "float32",
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Methods by schemes: perplexity, its ratio to full precision, KL divergence, and time.

    Every combination is calibrated on the same samples and measured on the same text.
    """
    from loopq_compile import bench
    from loopq_compile.graph.options import CalibrationOptions

    say = note(json)
    runs = bench.variants(names(methods), names(schemes), names(activations), group_size=group_size)
    CalibrationOptions(seed=seed)  # refuses bad values before a model is loaded
    check_text(text, calibration)
    loaded = load_model(model, tokenizer, trust_remote_code, repeat, allow_pickle, dtype, device)
    tokens, source = text_tokens(loaded, text, max_tokens)
    batches = calibration_batches(calibration, loaded.tokenizer, samples, sample_length, seed, loaded.model)
    about: dict[str, Any] = {"model": model, "text": source, "tokens": len(tokens), "length": length, "stride": stride}
    about |= {
        "calibration": calibration,
        "samples": samples,
        "sample_length": sample_length,
        "seed": seed,
        "dtype": dtype,
    }
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
