"""The tables and figures of the LoopQ paper, as commands: `bench table1` to `bench fig6`; and `bench budget`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loopq_compile.cli.bench.options import (
    Activations,
    Budget,
    Fresh,
    GroupSize,
    Methods,
    Model,
    Numbers,
    Out,
    SampleLength,
    Samples,
    Schemes,
    Seeds,
    WeightSolver,
    load_model,
    show,
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
    check_text,
    names,
    note,
    text_source,
    whole_numbers,
)

if TYPE_CHECKING:
    from loopq_compile.bench.settings import Selection, Settings
    from loopq_compile.sources.loading import Loaded

_ALL = "symmetric,smoothquant,quarot,spinquant,flatquant,flatquant-e2e,loopq-paper,loopq"
_E2E = "symmetric,flatquant-e2e,loopq"
_BOTH, _DYNAMIC = "static,dynamic", "dynamic"
REPORTS = {
    "table1": (
        "Methods by schemes: perplexity, distance to full precision, cost of calibration.",
        (_ALL, "w4a4,w4a8", _BOTH),
    ),
    "table2": (
        "Ablation of LoopQ: without scales (LAS), transforms (SLT), adapter (CTA), trajectory loss.",
        ("loopq", "w4a4", _BOTH),
    ),
    "table5": ("Parameters and memory by part; what differs from loop to loop.", (_E2E, "w4a4", _DYNAMIC)),
    "solvers": (
        "Ways to choose the integers of weights, without and after transforms.",
        ("symmetric,loopq", "w4a8", _DYNAMIC),
    ),
    "fig1": ("Activation ranges by loop; how errors grow along the trajectory.", ("symmetric", "w4a4", _BOTH)),
    "fig2": ("Relative error along the whole unrolled trajectory, by method.", (_ALL, "w4a4", _DYNAMIC)),
    "fig3": ("Scores of groups, and which get transforms for every loop.", ("loopq", "w4a4", _DYNAMIC)),
    "fig4": ("Perplexity by number of groups with transforms for every loop.", ("loopq", "w4a4", _DYNAMIC)),
    "fig5": ("Perplexity by number of loops that run, beyond those calibrated.", (_E2E, "w4a4", _DYNAMIC)),
    "fig6": ("Perplexity by number of calibration samples.", ("flatquant-e2e,loopq", "w4a4", _DYNAMIC)),
    "budget": (
        "KL to the model by number of calibration steps, with their tokens and minutes.",
        ("loopq", "w4a4", _DYNAMIC),
    ),
}
"""Name of every report: what it shows, and its own defaults of methods, schemes and activations."""


def commands() -> Iterator[tuple[str, Callable[..., None]]]:
    """`bench NAME` for every report. All take the same options and differ in some defaults."""
    for name, (about, defaults) in REPORTS.items():
        yield name, _command(name, about, *defaults)


def _command(name: str, about: str, own_methods: str, own_schemes: str, own_activations: str) -> Callable[..., None]:
    def command(
        model: Model = "bundled",
        methods: Methods = own_methods,
        schemes: Schemes = own_schemes,
        activations: Activations = own_activations,
        group_size: GroupSize = 32,
        seeds: Seeds = "0",
        values: Numbers = "",
        budget: Budget = None,
        batch_rows: Annotated[int, typer.Option(min=1, help="Calibration samples in a step of learned methods.")] = 4,
        precision: Annotated[str, typer.Option(help="Of learned methods: float32 or bfloat16.")] = "float32",
        weight_solver: WeightSolver = None,
        text: TextFile = None,
        length: Length = 256,
        stride: Stride = 128,
        max_tokens: MaxTokens = 16384,
        calibration: CalibrationText = "docs",
        samples: Samples = 128,
        sample_length: SampleLength = 128,
        repeat: RepeatLayers = None,
        out: Out = None,
        fresh: Fresh = False,
        tokenizer: TokenizerFile = None,
        trust_remote_code: TrustRemoteCode = False,
        allow_pickle: AllowPickle = False,
        dtype: Dtype = "float32",
        device: Device = "auto",
        json: Json = False,
    ) -> None:
        from loopq_compile.bench import variants
        from loopq_compile.bench.settings import Selection, Settings
        from loopq_compile.graph.options import CalibrationOptions

        kinds = variants(["symmetric"], names(schemes), names(activations), group_size=group_size)
        drawn = whole_numbers("--seeds", seeds) or [0]
        for seed in drawn:
            CalibrationOptions(seed=seed)  # refuses bad values before a model is loaded
        check_text(None, calibration)
        content, source = text_source(text, max_tokens)
        settings = Settings(
            model=f"{model}@{repeat}" if repeat else model,
            text=source,
            calibration="docs" if calibration == "bundled" else calibration,
            samples=samples,
            sample_length=sample_length,
            length=length,
            stride=stride,
            options=_learning(batch_rows, precision, budget, weight_solver),
            cache=out / "calibration" if out else None,
        )
        selection = Selection(
            names(methods),
            [kind.scheme for kind in kinds],
            drawn,
            whole_numbers("--values", values),
        )
        loaded = load_model(model, tokenizer, trust_remote_code, repeat, allow_pickle, dtype, device)
        _measure(name, loaded, selection, settings, (content, max_tokens), out, fresh, json)

    command.__doc__ = f"{about}\n\n    With --out, finished cells are kept, and an interrupted run continues."
    return command


def _learning(batch_rows: int, precision: str, steps: int | None, weight_solver: str | None) -> dict[str, Any]:
    """Options of calibration that the user gave; others have each method's default."""
    given = {"steps": steps, "weight_solver": weight_solver}
    return {"batch_rows": batch_rows, "precision": precision, **{key: value for key, value in given.items() if value}}


def _measure(
    name: str,
    loaded: Loaded,
    selection: Selection,
    settings: Settings,
    text: tuple[str, int],
    out: Path | None,
    fresh: bool,
    json: bool,
) -> None:
    """Measures and shows report `name` on the first tokens (`text` is the whole, and how many)."""
    from loopq_compile.bench.cells import Cells
    from loopq_compile.bench.results import has_matplotlib
    from loopq_compile.bench.studies import REPORTS as MAKERS
    from loopq_compile.bench.study import Study
    from loopq_compile.generation.tokenizer import tokenize

    say = note(json)
    tokens = tokenize(loaded.tokenizer, *text)
    cells = Cells(out / "cells" if out else None, fresh)
    report = MAKERS[name](Study(loaded.model, loaded.tokenizer, tokens, settings, cells, say), selection)
    show(
        report,
        out,
        json,
        model=settings.model,
        text=settings.text,
        tokens=len(tokens),
        calibration=settings.calibration,
    )
    if report.draw is not None and out is not None and not has_matplotlib():
        say("no picture: it needs matplotlib, pip install 'loopq-compile[plot]'")
