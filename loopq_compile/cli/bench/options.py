"""Shared by the bench commands: options, models to measure, and how a report is shown."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loopq_compile.cli.common import console, load, note, table, text_source
from loopq_compile.errors import LoopQError

if TYPE_CHECKING:
    from torch import Tensor

    from loopq_compile.bench.results import Report
    from loopq_compile.sources.loading import Loaded

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


def _check_out(context: typer.Context, out: Path | None) -> Path | None:
    """Checks a folder for results before hours of measuring; a command's files are named after the command."""
    from loopq_compile.storage.atomic import check_folder
    from loopq_compile.storage.manifest import RESULTS

    if out is not None:
        check_folder(out, RESULTS, [f"{context.info_name}.{ending}" for ending in ("json", "md", "png")])
    return out


Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        metavar="DIR",
        callback=_check_out,
        help="Folder for JSON, Markdown, PNG, and for finished cells; other files in it stay.",
    ),
]
Fresh = Annotated[
    bool,
    typer.Option("--fresh", help="Measure again what DIR/cells has; needed when the code of a method has changed."),
]


def show(report: Report, out: Path | None, json: bool, **about: Any) -> None:
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


def load_model(
    model: str,
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
    repeat: str | None = None,
    allow_pickle: bool = False,
    dtype: str = "float32",
    device: str = "cpu",
) -> Loaded:
    """Loads a floating-point model onto `device`; refuses what is already quantized."""
    loaded = load(model, tokenizer, trust_remote_code, repeat, allow_pickle, dtype, device)
    if loaded.kind != "model":
        raise LoopQError(f"{model} is quantized already; bench takes a model in floating point.")
    return loaded


def text_tokens(loaded: Loaded, file: str | None, count: int) -> tuple[Tensor, str]:
    """The first `count` token ids `[n]` of the text to score (0: all), and a sentence about its source."""
    from loopq_compile.generation.tokenizer import tokenize

    content, source = text_source(file, count)
    return tokenize(loaded.tokenizer, content, count), source
