"""`loopq-compile bench`: a quick table of quality, and the tables and figures of the LoopQ paper."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loopq_compile.cli.common import (
    CalibrationText,
    Json,
    Length,
    MaxTokens,
    RepeatLayers,
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

if TYPE_CHECKING:
    from loopq_compile.bench.report import Report

app = typer.Typer(no_args_is_help=True, help="Measure methods and schemes against each other.")

Model = Annotated[
    str, typer.Argument(metavar="[MODEL]", help='"bundled", "smollm2", or a Hugging Face folder or hub id.')
]
Schemes = Annotated[str, typer.Option("--schemes", help="Comma-separated, such as w4a4,w4a8.")]
Methods = Annotated[str, typer.Option("--methods", help="Comma-separated, such as symmetric,las.")]
Activations = Annotated[str, typer.Option("--activations", help="Comma-separated: static, dynamic.")]
GroupSize = Annotated[
    int, typer.Option("--group-size", help="Neighbouring features that share a scale; -1 for whole rows.")
]
Samples = Annotated[int, typer.Option("--samples", min=1, help="Number of calibration samples.")]
SampleLength = Annotated[int, typer.Option("--sample-length", min=1, help="Tokens in a calibration sample.")]
Seeds = Annotated[str, typer.Option("--seeds", help="Comma-separated; with several, means and standard deviations.")]
Budget = Annotated[
    int | None, typer.Option("--budget", min=1, help="Optimizer steps of learned methods; by default their own number.")
]
WeightSolver = Annotated[
    str | None, typer.Option("--weight-solver", help="rtn, gptq or loaq for all methods; by default each its own.")
]
Numbers = Annotated[
    str,
    typer.Option(
        "--values", metavar="LIST", help="Points of fig4 (groups), fig5 (loops) or fig6 (samples), comma-separated."
    ),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="DIR", help="Folder for JSON, Markdown, PNG, and for finished cells."),
]
Fresh = Annotated[
    bool,
    typer.Option("--fresh", help="Measure again what DIR/cells has; needed when the code of a method has changed."),
]


@app.callback()
def _group() -> None:
    """Measure methods and schemes against each other."""


@app.command("quality")
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
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Folder for quality.json and quality.md.")
    ] = None,
    repeat: RepeatLayers = None,
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
    loaded = _load_model(model, tokenizer, trust_remote_code, repeat)
    content, source = text_source(text)
    tokens = tokenize(loaded.tokenizer, content, max_tokens)
    batches = calibration_batches(calibration, loaded.tokenizer, samples, sample_length, seed, loaded.model)
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


@app.command("loops")
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
        loaded = _load_model(model, None, False, f"{repeat}x{count}" if repeat else None).model
        if repeat is None:
            if not hasattr(loaded, "loops"):
                raise LoopQError(f"{model} has no number of loops to set; name layers to repeat: --repeat FIRST-LAST.")
            loaded.loops = count
        return loaded

    report = growth(with_loops, _whole_numbers("--values", values), Scheme.parse(scheme), length, names(targets))
    _show(report, out, json, model=f"{model}@{repeat}" if repeat else model)


@app.command("speed")
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
    loaded = _load_model(model, None, False, repeat).model
    lengths, batches = (_whole_numbers(*pair) for pair in (("--prefill", prefill), ("--decode", decode)))
    job = Job(name, prefill=tuple(lengths), decode=tuple(batches), context=context, steps=steps, repeats=repeats)
    bits = [number or None for number in _whole_numbers("--head-bits", heads)]
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
    _show(report, out, json, model=name)


@app.command("compile")
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
    _show(compile_growth(sizes, method, Scheme.parse(scheme), export), out, json, method=method, scheme=scheme)


@app.command("kernels")
def kernels_command(
    static: Annotated[
        bool, typer.Option("--static", help="Compile without a GPU: registers, spills, shared memory, instructions.")
    ] = False,
    grid: Annotated[bool, typer.Option("--grid", help="Every tile of the tuning grid; takes many minutes.")] = False,
    architectures: Annotated[
        str, typer.Option("--sm", metavar="LIST", help="Compute capabilities such as 80,90; all by default.")
    ] = "",
    only: Annotated[str, typer.Option("--only", metavar="NAME", help="Kernels whose name contains NAME.")] = "",
    out: Out = None,
    json: Json = False,
) -> None:
    """The Triton kernels: what they need of each GPU architecture, and a roofline estimate from data sheets.

    Exits with status 1 if a kernel spills registers, does not fit, or misses its tensor-core instruction.
    """
    from loopq_compile.bench.kernels import estimate_report, static_report

    if not static:
        raise LoopQError("Kernels are not timed in this version; --static compiles them without a GPU and estimates.")
    report, estimate = static_report(_whole_numbers("--sm", architectures), grid, only), estimate_report()
    if json:
        report.data |= {"estimates": estimate.data}
        report.notes += estimate.notes
        _show(report, out, json)
    else:
        _show(report, out, json)
        _show(estimate, out, json)
    if report.data["failed"]:
        raise typer.Exit(1)


def _show(report: Report, out: Path | None, json: bool, **about: Any) -> None:
    """Prints a report, for people or machines, and writes it into `out`."""
    say = note(json)
    if json:
        typer.echo(report.to_json(**about), nl=False)
    else:
        console().print(table(report.columns, report.rows, text_columns=report.text_columns, title=report.title))
        say("\n".join(["", *report.notes]))
    if out is not None:
        for path in report.write(out, **about):
            say(f"wrote {path}")


def _load_model(model: str, tokenizer: str | None, trust_remote_code: bool, repeat: str | None) -> Any:
    loaded = load(model, tokenizer, trust_remote_code, repeat)
    if loaded.kind != "model":
        raise LoopQError(f"{model} is quantized already; bench takes a model in floating point.")
    return loaded


def _whole_numbers(option: str, text: str) -> list[int]:
    try:
        found = [int(part) for part in names(text)]
    except ValueError as error:
        raise LoopQError(f"{option} takes whole numbers, comma-separated; got {text!r}.") from error
    if any(number < 0 for number in found):
        raise LoopQError(f"{option} takes numbers from 0 on; got {text!r}.")
    return found


def _add(name: str, help: str, *own: str) -> None:
    """Registers `bench NAME`. All take the same options and differ in the defaults of methods, schemes, activations."""

    def command(
        model: Model = "bundled",
        methods: Methods = own[0],
        schemes: Schemes = own[1],
        activations: Activations = own[2],
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
        json: Json = False,
    ) -> None:
        from loopq_compile import bench
        from loopq_compile.bench.cells import Cells
        from loopq_compile.bench.report import has_matplotlib
        from loopq_compile.bench.reports import REPORTS
        from loopq_compile.bench.settings import Selection, Settings
        from loopq_compile.bench.study import Study
        from loopq_compile.evaluate import tokenize

        say = note(json)
        kinds = bench.variants(["symmetric"], names(schemes), names(activations), group_size=group_size)
        selection = Selection(
            names(methods),
            [kind.scheme for kind in kinds],
            _whole_numbers("--seeds", seeds) or [0],
            _whole_numbers("--values", values),
        )
        loaded = _load_model(model, tokenizer, trust_remote_code, repeat)
        content, source = text_source(text)
        tokens = tokenize(loaded.tokenizer, content, max_tokens)
        settings = Settings(
            model=f"{model}@{repeat}" if repeat else model,
            text=source,
            calibration="docs" if calibration == "bundled" else calibration,
            samples=samples,
            sample_length=sample_length,
            length=length,
            stride=stride,
            options={"batch_rows": batch_rows, "precision": precision}
            | ({"steps": budget} if budget else {})
            | ({"weight_solver": weight_solver} if weight_solver else {}),
            cache=out / "calibration" if out else None,
        )
        cells = Cells(out / "cells" if out else None, fresh)
        report = REPORTS[name](Study(loaded.model, loaded.tokenizer, tokens, settings, cells, say), selection)
        _show(report, out, json, model=settings.model, text=source, tokens=len(tokens), calibration=calibration)
        if report.draw is not None and out is not None and not has_matplotlib():
            say("no picture: it needs matplotlib, pip install 'loopq-compile[plot]'")

    command.__doc__ = (
        f"{help}\n\n    With --out, finished cells are kept: a run that was cut off goes on where it stood."
    )
    app.command(name)(command)


_ALL = "symmetric,smoothquant,quarot,spinquant,flatquant,flatquant-e2e,loopq-paper,loopq"
_E2E = "symmetric,flatquant-e2e,loopq"
_BOTH, _DYNAMIC = "static,dynamic", "dynamic"
for _name, _help, *_own in (
    (
        "table1",
        "Methods by schemes: perplexity, distance to full precision, cost of calibration.",
        *(_ALL, "w4a4,w4a8", _BOTH),
    ),
    (
        "table2",
        "Ablation of LoopQ: without scales (LAS), transforms (SLT), adapter (CTA), trajectory loss.",
        *("loopq", "w4a4", _BOTH),
    ),
    ("table5", "Parameters and memory by part; what differs from loop to loop.", _E2E, "w4a4", _DYNAMIC),
    (
        "solvers",
        "Ways to choose the integers of weights, without and behind transforms.",
        *("symmetric,loopq", "w4a8", _DYNAMIC),
    ),
    ("fig1", "Activation ranges by loop; how errors grow along the trajectory.", "symmetric", "w4a4", _BOTH),
    ("fig2", "Relative error along the whole unrolled trajectory, by method.", _ALL, "w4a4", _DYNAMIC),
    ("fig3", "Scores of groups, and which get transforms for every loop.", "loopq", "w4a4", _DYNAMIC),
    ("fig4", "Perplexity by number of groups with transforms for every loop.", "loopq", "w4a4", _DYNAMIC),
    ("fig5", "Perplexity by number of loops that run, beyond those calibrated.", _E2E, "w4a4", _DYNAMIC),
    ("fig6", "Perplexity by number of calibration samples.", "flatquant-e2e,loopq", "w4a4", _DYNAMIC),
):
    _add(_name, _help, *_own)
