"""`loopq-compile bisect`."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loopq_compile.cli.common import (
    AllowPickle,
    Dtype,
    Json,
    Model,
    RepeatLayers,
    TrustRemoteCode,
    calibration_batches,
    check_text,
    console,
    default_text,
    load,
    print_json,
    table,
)
from loopq_compile.errors import LoopQError

if TYPE_CHECKING:
    from loopq_compile.analysis.bisect import Bisection, Step

FAILED = 3
"""Exit status where a check failed."""


def bisect_command(
    model: Model,
    scheme: Annotated[str, typer.Option(help="As for `compile`.")] = "w4a4",
    method: Annotated[str, typer.Option(help="As for `compile`.")] = "symmetric",
    activation: Annotated[str, typer.Option(help="dynamic or static.")] = "dynamic",
    limit: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Largest acceptable relative error of the results; without it, the pass that added most is named.",
        ),
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(metavar="self|docs|mixed|FILE", help="Calibration text, for methods that need it.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Number of calibration samples.")] = 8,
    length: Annotated[int, typer.Option(min=1, help="Tokens in a calibration sample, and in the probe.")] = 32,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps of methods that learn.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of everything random.")] = 0,
    repeat: RepeatLayers = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    dtype: Dtype = "float32",
    json: Json = False,
) -> None:
    """Find the pass that broke numerics: compile again and compare with the model after every pass.

    Shows the relative error of the results after each pass, and the first node that a pass moved. Ends with status 3
    if --limit is exceeded, for use in scripts.

    Example: loopq-compile bisect bundled --method las --limit 0.5
    """
    import torch

    from loopq_compile.analysis.bisect import bisect
    from loopq_compile.capture.to_graph import capture
    from loopq_compile.graph.options import CalibrationOptions
    from loopq_compile.graph.scheme import Scheme
    from loopq_compile.methods import get_pipeline

    wanted, pipeline = Scheme.parse(scheme, activation=activation), get_pipeline(method)
    options = CalibrationOptions(steps=steps, seed=seed)
    check_text(None, calibration)
    loaded = load(model, None, trust_remote_code, repeat, allow_pickle, dtype)
    if loaded.kind != "model":
        raise LoopQError(f"{model} is quantized already; bisect compiles a model in floating point again.")
    source = calibration or default_text(pipeline.name, activation, loaded)
    batches = calibration_batches(source, loaded.tokenizer, samples, length, seed, loaded.model) if source else None
    captured = capture(loaded.model)
    probe = batches[0][:1] if batches else torch.arange(length).unsqueeze(0)
    found = bisect(captured, wanted, pipeline, [probe], batches, limit=limit, options=options)
    _show(found, json)
    if limit is not None and found.culprit is not None:
        raise typer.Exit(FAILED)


def _show(found: Bisection, json: bool) -> None:
    if json:
        print_json({"steps": [_plain(step) for step in found.steps], "culprit": _plain(found.culprit)})
        return
    rows = []
    for step in found.steps:
        place = step.first
        shown = (place.node, place.loop, place.site, f"{place.error:.3g}") if place else ("", "", "", "")
        rows.append((str(step.number), step.pass_name, f"{step.error:.3g}", f"{step.change:+.2g}", *shown))
    columns = ("", "pass", "error", "change", "first node that moved", "loop", "site", "by")
    console().print(table(columns, rows, text_columns=2))
    name = f"{found.culprit.number} {found.culprit.pass_name}" if found.culprit else "none"
    console().print(f"\npass to look at: {name}", markup=False)


def _plain(step: Step | None) -> dict[str, Any] | None:
    """Plain values for JSON, in which infinite errors are null."""
    if step is None:
        return None
    values = asdict(step)
    for name in ("error", "change"):
        values[name] = values[name] if math.isfinite(values[name]) else None
    if values["first"] and not math.isfinite(values["first"]["error"]):
        values["first"]["error"] = None
    return values
