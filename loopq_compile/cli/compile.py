"""`loopq-compile compile`."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loopq_compile.cli.common import (
    TEXTS,
    AllowPickle,
    Device,
    Dtype,
    Json,
    Model,
    RepeatLayers,
    TokenizerFile,
    TrustRemoteCode,
    calibration_batches,
    check_text,
    default_text,
    load,
    note,
    print_json,
)
from loopq_compile.errors import LoopQError

if TYPE_CHECKING:
    from torch import Tensor

    from loopq_compile.analysis.machine import Machine
    from loopq_compile.graph.options import CalibrationOptions
    from loopq_compile.graph.scheme import Scheme
    from loopq_compile.program import Program
    from loopq_compile.sources.loading import Loaded


def compile_command(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="New folder for the quantized program.")],
    scheme: Annotated[
        str, typer.Option(help="Bits of weights and activations: w4a4, w4a8, w8a8, w4a16, any w{2..8}a{2..8,16}.")
    ] = "w4a4",
    method: Annotated[
        str,
        typer.Option(
            help="loopq, loopq-plain, loopq-paper, las, flatquant-e2e, flatquant, spinquant, quarot, smoothquant, or "
            "symmetric."
        ),
    ] = "loopq",
    activation: Annotated[
        str,
        typer.Option(
            help="dynamic: activation scales are computed for every token at run time. static: they are constants from "
            "calibration."
        ),
    ] = "dynamic",
    group_size: Annotated[int, typer.Option(help="Neighbouring features that share a scale; -1 for whole rows.")] = 32,
    positive_scales: Annotated[
        bool,
        typer.Option("--positive-scales", help="No negative scales, for engines that take none (compressed-tensors)."),
    ] = False,
    skip: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Linear layers to leave in floating point: '*.o_proj'. Repeatable."),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="self|docs|mixed|FILE",
            help="Text to calibrate on: sampled by the model itself, docstrings of the installed libraries, half of "
            f"each, or {TEXTS}. By default docs, if the method needs text.",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Number of calibration samples.")] = 128,
    length: Annotated[int, typer.Option(min=1, help="Tokens in a calibration sample.")] = 128,
    seed: Annotated[int, typer.Option(min=0, help="Of everything random: samples, signs, order.")] = 0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps of methods that learn; by default the method's own.")
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            metavar="N",
            help="Instead of --steps: how long the compilation may take. A rehearsal chooses the steps that fit.",
        ),
    ] = None,
    batch_rows: Annotated[int, typer.Option(min=1, help="Calibration samples in a step.")] = 4,
    statistics_tokens: Annotated[
        int,
        typer.Option(
            min=1, help="Tokens that ranges, smoothing and weight solvers measure, spread over the calibration samples."
        ),
    ] = 16384,
    weight_solver: Annotated[
        str | None, typer.Option(help="rtn, gptq or loaq: how integers are found; by default the method's own.")
    ] = None,
    precision: Annotated[str, typer.Option(help="float32, or bfloat16 where the processor has it.")] = "float32",
    recompute: Annotated[
        str,
        typer.Option(help="on: keep only what crosses layers for the backward pass. off: keep all. auto: by size."),
    ] = "auto",
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for checkpoints; a killed calibration continues from there."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Predict size, memory and time; quantize and write nothing.")
    ] = False,
    machine: Annotated[
        str | None,
        typer.Option(
            metavar="MEMORY,RATE,BANDWIDTH",
            help="With --dry-run: predict by formula for another machine, such as 32GiB,105TFLOPS,1.79TB/s.",
        ),
    ] = None,
    repeat: RepeatLayers = None,
    tokenizer: TokenizerFile = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    dtype: Dtype = "float32",
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Quantize a model and save it as a program.

    The folder holds program.json (the graph, readable), tensors.safetensors, the tokenizer and generation settings.
    Look at it with `loopq-compile inspect DIR`, measure it with `eval`, turn it into ONNX with `export`.

    Example: loopq-compile compile bundled --scheme w4a8 --activation static --out my-program
    """
    from loopq_compile.graph.options import CalibrationOptions
    from loopq_compile.graph.scheme import Scheme
    from loopq_compile.methods import get_pipeline
    from loopq_compile.planning.budget import check_learns
    from loopq_compile.storage.artifact import FILES
    from loopq_compile.storage.atomic import check_file, check_folder
    from loopq_compile.storage.manifest import PROGRAM

    chosen = {"group_size": group_size, "signed_scales": not positive_scales, "skip": tuple(skip or ())}
    wanted = Scheme.parse(scheme, activation=activation, **chosen)
    pipeline = get_pipeline(method)  # unknown names fail before a model is loaded
    options = CalibrationOptions(
        steps=steps,
        minutes=minutes,
        seed=seed,
        batch_rows=batch_rows,
        statistics_tokens=statistics_tokens,
        weight_solver=weight_solver,
        precision=precision,
        recompute=recompute,
        checkpoint=str(checkpoint) if checkpoint else None,
    )
    if minutes is not None:
        check_learns(pipeline, minutes, has_data=True)
    elsewhere = _machine(machine, dry_run)
    check_folder(out, PROGRAM, FILES)
    if checkpoint:
        check_file(checkpoint / "phase")
    check_text(None, calibration)
    loaded = load(model, tokenizer, trust_remote_code, repeat, allow_pickle, dtype, device)
    if loaded.kind != "model":
        raise LoopQError(f"{model} is quantized already; compile takes a model in floating point.")
    check_folder(out, PROGRAM, loaded.files())
    source = calibration or default_text(method, activation, loaded)
    batches = _batches(source, loaded, samples, length, seed, note(json))
    if dry_run:
        _predict(loaded.model, wanted, pipeline, batches, options, elsewhere, json)
    else:
        _show(_compile(loaded, wanted, method, batches, source, options, out), out, json)


def _batches(
    source: str | None,
    loaded: Loaded,
    samples: int,
    length: int,
    seed: int,
    say: Callable[[str], None],
) -> list[Tensor] | None:
    if not source:
        return None
    from loopq_compile.sources.self_generated import SUBSTITUTES, provenance

    batches = calibration_batches(source, loaded.tokenizer, samples, length, seed, model=loaded.model)
    say(f"calibrating on {sum(map(len, batches))} samples of {length} tokens from {source}")
    if source in SUBSTITUTES:
        say(provenance(source))
    return batches


def _compile(
    loaded: Loaded,
    scheme: Scheme,
    method: str,
    batches: list[Tensor] | None,
    source: str | None,
    options: CalibrationOptions,
    out: Path,
) -> Program:
    """Quantizes the model, releases its weights one by one, and saves the program with its tokenizer; its log names the
    `source` of the text."""
    from loopq_compile.compiler import compile as compile_model
    from loopq_compile.graph.state import LogEntry
    from loopq_compile.processes import barrier
    from loopq_compile.sources.self_generated import provenance
    from loopq_compile.storage.artifact import save

    program = compile_model(
        loaded.model, scheme=scheme, method=method, calibration=batches, release_model=True, **options.to_dict()
    )
    if source and batches:
        program.log.insert(0, LogEntry("calibration-text", False, [provenance(source)]))
    save(program.graph_module, out, loaded.files())
    barrier()  # the report reads what the first process wrote
    return program


def _machine(text: str | None, dry_run: bool) -> Machine | None:
    from loopq_compile.analysis.machine import Machine

    if text is None:
        return None
    if not dry_run:
        raise LoopQError("--machine predicts for another machine, and needs --dry-run.")
    return Machine.parse(text)


def _predict(
    model: Any,
    scheme: Scheme,
    pipeline: Any,
    batches: list[Tensor] | None,
    options: CalibrationOptions,
    machine: Machine | None,
    json: bool,
) -> None:
    from dataclasses import asdict

    from loopq_compile.analysis.estimate import estimate
    from loopq_compile.capture.to_graph import capture
    from loopq_compile.graph.device import device_of
    from loopq_compile.memory import Peak

    peak, say = Peak(device_of(model)), note(json)
    found = estimate(capture(model), scheme, pipeline, batches or (), options, peak, machine)
    if json:
        print_json({"dry_run": True, **asdict(found)})
        return
    seconds = "unknown without calibration data" if found.seconds is None else f"about {duration(found.seconds)}"
    if found.budget is not None:
        say(found.budget.text)
    shown = [cost for cost in found.passes if cost.seconds > 0.01 * (found.seconds or math.inf)]
    for cost in shown:
        say(f"{cost.name:20s} {duration(cost.seconds):>10s} {cost.memory / 2**20:10,.0f} MiB")
    say(
        f"{found.loops}; {found.quantized} of {found.linears} linears quantized, {found.parameters:,} parameters\n"
        f"size {found.bytes / 2**20:,.2f} MiB, memory up to {found.memory / 2**20:,.0f} MiB more, time {seconds}"
        f"{', by formula, for ' + str(machine) if machine else ''}; nothing was written"
    )


def duration(seconds: float) -> str:
    """`"40 s"`, `"12 min"` or `"3.5 h"`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _show(program: Program, out: Path, json: bool) -> None:
    if json:
        print_json(_report(program, out))
    else:
        say = note(json)
        say(program.summary())
        say(f"\nwrote {out}; next: loopq-compile inspect {out}, loopq-compile export {out} --out {out}-onnx")


def _report(program: Program, out: Path) -> dict[str, Any]:
    from loopq_compile.graph.state import get_state
    from loopq_compile.storage.manifest import PROGRAM, listed

    return {
        "out": str(out),
        "bytes": sum(entry["bytes"] for entry in listed(out, PROGRAM).values()),
        "method": get_state(program.graph_module).method,
        "scheme": program.scheme.to_dict() if program.scheme else None,
        "loops": program.loops.describe(),
        "loop_count": program.loops.count,
        "passes": [entry.pass_name for entry in program.log],
    }
