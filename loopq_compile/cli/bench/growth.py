"""`loopq-compile bench loops`, `exit`, `calibrate`, `memory` and `compile`: what more loops and layers cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from loopq_compile.cli.bench.options import (
    Activations,
    GroupSize,
    Model,
    Out,
    Samples,
    Schemes,
    load_model,
    show,
    text_tokens,
)
from loopq_compile.cli.common import (
    AllowPickle,
    Dtype,
    Json,
    Length,
    MaxTokens,
    RepeatLayers,
    TextFile,
    TrustRemoteCode,
    calibration_batches,
    check_text,
    names,
    note,
    whole_numbers,
)
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
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    out: Out = None,
    json: Json = False,
) -> None:
    """How exported files grow with the number of loops: nodes, bytes, time to open, memory, time of a call."""
    from loopq_compile.bench.loops import growth
    from loopq_compile.graph.scheme import Scheme

    def with_loops(count: int) -> Any:
        loaded = load_model(model, None, trust_remote_code, f"{repeat}x{count}" if repeat else None, allow_pickle).model
        if repeat is None:
            if not hasattr(loaded, "loops"):
                raise LoopQError(f"{model} has no number of loops to set; name layers to repeat: --repeat FIRST-LAST.")
            loaded.loops = count
        return loaded

    report = growth(with_loops, whole_numbers("--values", values), Scheme.parse(scheme), length, names(targets))
    show(report, out, json, model=f"{model}@{repeat}" if repeat else model)


def beyond_command(
    model: Model = "bundled",
    values: Annotated[str, typer.Option("--values", metavar="LIST", help="Numbers of loops.")] = "2,3,4,5,6,8",
    schemes: Schemes = "w4a8,w4a4",
    activations: Activations = "dynamic,static",
    method: Annotated[str, typer.Option("--method", help="Of the program that is compiled.")] = "las",
    samples: Samples = 32,
    text: TextFile = None,
    max_tokens: MaxTokens = 4096,
    length: Length = 256,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    out: Out = None,
    json: Json = False,
) -> None:
    """Perplexity with more loops than were calibrated, or fewer: one rolled file, its loop count set at run time."""
    from loopq_compile.bench.beyond import beyond
    from loopq_compile.graph.scheme import Scheme

    def with_loops(count: int | None) -> Any:
        return _with_loops(load_model(model, None, trust_remote_code, None, allow_pickle).model, model, count)

    check_text(text)
    loaded = load_model(model, None, trust_remote_code, None, allow_pickle)
    tokens, source = text_tokens(loaded, text, max_tokens)
    batches = calibration_batches("docs", loaded.tokenizer, samples, 128, 0)
    chosen = [Scheme.parse(scheme, activation=kind) for scheme in names(schemes) for kind in names(activations)]
    counts = whole_numbers("--values", values)
    report = beyond(with_loops, tokens, counts, chosen, method, batches, length, say=note(True))
    show(report, out, json, model=model, text=source)


def _with_loops(loaded: Any, model: str, count: int | None) -> Any:
    if count is not None:
        if not hasattr(loaded, "loops"):
            raise LoopQError(f"{model} has no number of loops to set.")
        loaded.loops = count
    return loaded


def exit_command(
    model: Model = "bundled",
    schemes: Schemes = "w4a8,w4a4",
    values: Annotated[
        str, typer.Option("--values", metavar="LIST", help="Thresholds of the cumulative exit probability.")
    ] = "1,0.9,0.8,0.7,0.6,0.5,0.3",
    text: TextFile = None,
    max_tokens: MaxTokens = 2048,
    length: Length = 256,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    out: Out = None,
    json: Json = False,
) -> None:
    """Loops spent against perplexity where a loop stops early, for models with an exit gate."""
    from loopq_compile.bench.exits import exits

    try:
        thresholds = [float(value) for value in names(values)]
    except ValueError as error:
        raise LoopQError(f"--values takes numbers, comma-separated; got {values!r}.") from error
    check_text(text)
    loaded = load_model(model, None, trust_remote_code, None, allow_pickle)
    tokens, source = text_tokens(loaded, text, max_tokens)
    report = exits(loaded.model, tokens, names(schemes), thresholds, length, say=note(True))
    show(report, out, json, model=model, text=source)


def cache_command(
    model: Model = "bundled",
    repeat: RepeatLayers = None,
    schemes: Schemes = "w4a8",
    values: Annotated[
        str, typer.Option("--values", metavar="LIST", help="Bits of keys and values; 0 for floating point.")
    ] = "0,8,4",
    text: TextFile = None,
    max_tokens: MaxTokens = 4096,
    length: Length = 256,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    out: Out = None,
    json: Json = False,
) -> None:
    """Perplexity and bytes a token of key-value caches in floating point, 8 and 4 bits."""
    from loopq_compile.bench.cache import caches

    check_text(text)
    loaded = load_model(model, None, trust_remote_code, repeat, allow_pickle)
    tokens, source = text_tokens(loaded, text, max_tokens)
    bits = [number or None for number in whole_numbers("--values", values)]
    report = caches(loaded.model, tokens, names(schemes), bits, length, say=note(True))
    show(report, out, json, model=f"{model}@{repeat}" if repeat else model, text=source)


def calibrate_command(
    model: Model = "bundled",
    repeat: RepeatLayers = None,
    scheme: Annotated[str, typer.Option("--scheme", help="As for compile.")] = "w4a4",
    method: Annotated[str, typer.Option("--method", help="As for compile.")] = "loopq",
    batch_rows: Annotated[int, typer.Option("--batch-rows", min=1, help="Rows in a step.")] = 4,
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens in a row.")] = 128,
    precision: Annotated[str, typer.Option("--precision", help="Of matrix products: float32 or bfloat16.")] = "float32",
    recompute: Annotated[str, typer.Option("--recompute", help="As for compile: auto, on or off.")] = "auto",
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="How often each part is timed.")] = 3,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    out: Out = None,
    json: Json = False,
) -> None:
    """Seconds of a calibration step by part, in every phase, and tokens a second against the plain forward pass."""
    from loopq_compile.bench.calibrate import step_parts
    from loopq_compile.capture.to_graph import capture
    from loopq_compile.graph.options import CalibrationOptions
    from loopq_compile.graph.scheme import Scheme

    loaded = load_model(model, None, trust_remote_code, repeat, allow_pickle)
    batches = calibration_batches("docs", loaded.tokenizer, 4 * batch_rows, length, 0)
    options = CalibrationOptions(batch_rows=batch_rows, precision=precision, recompute=recompute)
    captured = capture(loaded.model)
    report = step_parts(captured, Scheme.parse(scheme), method, batches, options, repeats, say=note(True))
    show(report, out, json, model=f"{model}@{repeat}" if repeat else model)


def memory_command(
    width: Annotated[int, typer.Option("--width", min=64, help="Features of the residual stream.")] = 1024,
    layers: Annotated[str | None, typer.Option("--layers", metavar="LIST", help="Numbers of layers: 2,4.")] = None,
    loops: Annotated[int, typer.Option("--loops", min=1, help="Times that the layers run.")] = 3,
    scheme: Annotated[str, typer.Option("--scheme", help="As for compile.")] = "w4a4",
    method: Annotated[str, typer.Option("--method", help="As for compile.")] = "loopq",
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimizer steps over all phases.")] = 8,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Calibration rows of random tokens.")] = 8,
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens in a row.")] = 64,
    precision: Annotated[str, typer.Option("--precision", help="Of matrix products: float32 or bfloat16.")] = "float32",
    processes: Annotated[
        int, typer.Option("--processes", min=1, help="Processes that share each calibration; the largest counts.")
    ] = 1,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="NAME", help="One of published size, with its file: ouro-1.4b, ouro-2.6b."),
    ] = None,
    batch_rows: Annotated[int, typer.Option("--batch-rows", min=1, help="Rows in a step.")] = 4,
    dtype: Dtype = "float32",
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", metavar="DIR", help="With --model: continue if it is started again.")
    ] = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Time and peak memory of a calibration by pass at several depths, as predicted by the dry run and as measured."""
    from loopq_compile.bench.memory import memory, memory_of
    from loopq_compile.sources.hugging_face import LoadOptions

    counts = whole_numbers("--layers", layers) if layers else []
    options: dict[str, Any] = {"precision": precision, "batch_rows": batch_rows}
    if model is not None:
        if len(counts) > 1:
            raise LoopQError(f"--model measures one number of layers; got --layers {layers}.")
        if checkpoint is not None:
            options["checkpoint"] = str(checkpoint)
        only, dtype = counts[0] if counts else None, LoadOptions(dtype=dtype).dtype
        report = memory_of(model, only, scheme, method, steps, samples, length, options, dtype=dtype, say=note(True))
        show(report, out, json)
        return
    counts = counts or [2, 4]
    report = memory(
        width, counts, loops, scheme, method, steps, samples, length, options, processes=processes, say=note(True)
    )
    show(report, out, json)


def size_command(
    model: Annotated[str, typer.Argument(metavar="NAME", help="ouro-1.4b or ouro-2.6b.")] = "ouro-1.4b",
    scheme: Annotated[str, typer.Option("--scheme", help="Weights are rounded to nearest, without data.")] = "w4a4",
    layers: Annotated[int | None, typer.Option("--layers", min=1, help="Fewer layers, to try it out.")] = None,
    head_bits: Annotated[int, typer.Option("--head-bits", help="Of the head: 8, 4, or 0 for floating point.")] = 8,
    float_bits: Annotated[int, typer.Option("--float-bits", help="Of scales, embeddings and the rest.")] = 16,
    group_size: GroupSize = 32,
    out: Out = None,
    json: Json = False,
) -> None:
    """A model of published size with random weights, compiled end to end: time, memory, bytes on disk and loaded."""
    from loopq_compile.bench.size import size

    report = size(model, scheme, layers, head_bits or None, float_bits, group_size, say=note(True))
    show(report, out, json, model=model)


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
    from loopq_compile.graph.scheme import Scheme

    sizes = []
    for part in names(values):
        layers, _, loops = part.partition("x")
        if not (layers.isdigit() and loops.isdigit() and int(layers) and int(loops)):
            raise LoopQError(f"--values takes layers x loops, such as 4x4,8x8; got {values!r}.")
        sizes.append((int(layers), int(loops)))
    if not sizes:
        raise LoopQError("--values names no size; write for instance 4x4,8x8.")
    show(compile_growth(sizes, method, Scheme.parse(scheme), export), out, json, method=method, scheme=scheme)
