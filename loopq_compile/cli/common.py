"""Shared by the commands: consoles, errors as one message, options, and loading of models and texts by name."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from loopq_compile.errors import InternalError, LoopQError

if TYPE_CHECKING:
    from torch import Tensor

    from loopq_compile.sources.loading import Loaded

TEXTS = (
    "a file: .txt, .jsonl, .json (field `text`, or FILE@FIELD), also compressed; .parquet; a folder of these, or one "
    "that `datasets` saved"
)
"""Sources that are read as text, for help."""
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help='"bundled", "smollm2", a Hugging Face folder or hub id, a folder written by `compile`, or an .onnx file.',
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of text for people.")]
TokenizerFile = Annotated[
    str | None,
    typer.Option("--tokenizer", metavar="FILE", help="tokenizer.json to use; by default the model's own."),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Let a Hugging Face repository run its own Python code. Read it first."),
]
AllowPickle = Annotated[
    bool,
    typer.Option(
        "--allow-pickle", help="Open Hugging Face weights that are not safetensors. Only if you trust their source."
    ),
]
Dtype = Annotated[
    str,
    typer.Option("--dtype", help="Load the model's weights as float32, bfloat16 or float16."),
]
Device = Annotated[
    str, typer.Option("--device", help="Where to run: auto (a GPU if there is one), cpu, cuda, or cuda:1.")
]
TextFile = Annotated[
    str | None,
    typer.Option(
        "--text",
        metavar="FILE",
        help=f"Text to score: {TEXTS}. By default the bundled model's held-out text.",
    ),
]
Length = Annotated[int, typer.Option("--length", min=2, help="Tokens in a window.")]
Stride = Annotated[
    int, typer.Option("--stride", min=1, help="Tokens from one window to the next; each token is scored once.")
]
CalibrationText = Annotated[
    str,
    typer.Option(
        "--calibration",
        metavar="self|docs|mixed|FILE",
        help="Text to calibrate on: sampled by the model itself, docstrings of the installed libraries, half of each, "
        f"or {TEXTS}.",
    ),
]
RepeatLayers = Annotated[
    str | None,
    typer.Option(
        "--repeat",
        metavar="FIRST-LASTxTIMES",
        help="Make a looped model of a Hugging Face model: 12-15x3 runs layers 12 to 15 three times. The same as the "
        "model name MODEL@12-15x3.",
    ),
]
ExitThreshold = Annotated[
    float | None,
    typer.Option(
        "--exit-threshold",
        metavar="P",
        help="Stop the loop of every token when its exit gate has given this cumulative probability. For programs, and "
        "files written with `export --form rolled --early-exit`.",
    ),
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=0, help="Score only the first N tokens; 0 for all.")]


_GLANCE = 1 << 16
"""How many characters are read to check a text."""
DEFECT = 70
"""Exit status of internal errors; `EX_SOFTWARE` in BSD's sysexits."""


def follows() -> bool:
    """Whether another process of `torchrun` speaks for all. Says so before torch is loaded."""
    return os.environ.get("RANK", "0") != "0" and os.environ.get("WORLD_SIZE", "1") != "1"


class Commands(TyperGroup):
    """Commands whose errors reach the user as one message on standard error and exit status 1."""

    def invoke(self, ctx: Any) -> Any:
        if follows():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        for stream in (sys.stdout, sys.stderr):  # characters that a terminal cannot show appear as \\u732b
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return super().invoke(ctx)
            except LoopQError as error:
                _fail(str(error))
            except InternalError as error:
                _fail(f"{error}\nThis is a defect, of this program or of a custom pass. Please report it.", DEFECT)
            except BrokenPipeError:  # the reader (head, less) has ended
                sys.stdout = open(os.devnull, "w")  # noqa: SIM115
                raise typer.Exit(1) from None
            except OSError as error:
                _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")


def _fail(message: str, status: int = 1) -> None:
    console(stderr=True).print("[bold red]error:[/]", end=" ")
    typer.echo(message, err=True)
    raise typer.Exit(status)


def console(stderr: bool = False) -> Console:
    """A console that does not squeeze tables into 80 columns if there is no terminal."""
    made = Console(stderr=stderr, soft_wrap=False, highlight=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made = Console(stderr=stderr, width=160, highlight=False)
    return made


def print_json(value: Any) -> None:
    """JSON on standard output."""
    typer.echo(json.dumps(value, indent=2))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1, title: str = "") -> Table:
    """A table whose first `text_columns` are aligned left, the others right."""
    made = Table(box=None, pad_edge=False, header_style="bold", title=title or None, title_justify="left")
    for i, name in enumerate(columns):
        made.add_column(name, justify="left" if i < text_columns else "right", overflow="fold", no_wrap=i > 0)
    for row in rows:
        made.add_row(*row)
    return made


def load(
    name: str,
    tokenizer_file: str | None = None,
    trust_remote_code: bool = False,
    repeat: str | None = None,
    allow_pickle: bool = False,
    dtype: str = "float32",
    device: str = "cpu",
) -> Loaded:
    """`load_model`, with the tokenizer of `tokenizer_file` if one is given, layers repeated as `repeat` says, and the
    model or program on `device`."""
    from loopq_compile.generation.tokenizer import read_tokenizer
    from loopq_compile.graph.device import find_device
    from loopq_compile.sources.loading import load_model, repeat_in

    place = find_device(device)  # refused before a model is loaded
    if tokenizer_file:
        read_tokenizer(tokenizer_file)  # may fail, so it comes before loading a model, which takes long
    loaded = load_model(name, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle, dtype=dtype)
    loaded = repeat_in(loaded, repeat) if repeat else loaded
    if loaded.kind in ("model", "program"):
        loaded.model.to(place)
    elif device != "auto" and place.type != "cpu":
        raise LoopQError(f"{name} is an exported file, which runs on the CPU. Leave --device out.")
    return loaded.with_tokenizer(tokenizer_file) if tokenizer_file else loaded


def check_text(text: str | None = None, calibration: str | None = None) -> None:
    """Refuses an unreadable text before a model is loaded; reads only its beginning."""
    from loopq_compile.sources.calibration_text import read_text
    from loopq_compile.sources.self_generated import CALIBRATIONS

    if text is not None:
        read_text(text, _GLANCE)
    if calibration is not None and calibration not in (*CALIBRATIONS, "bundled"):
        read_text(calibration, _GLANCE, split="train")


def text_source(file: str | None, tokens: int = 0) -> tuple[str, str]:
    """The text to score, enough for this many tokens (0: all), and a sentence about its source."""
    if file is not None:
        from loopq_compile.sources.calibration_text import read_text

        return read_text(file, 64 * tokens or None), file
    from loopq_compile.bundled import held_out_text

    held_out = held_out_text()
    return held_out.text, str(held_out)


def calibration_batches(
    source: str, tokenizer: Any, samples: int, length: int, seed: int, model: Any = None, cache: Any = None
) -> list[Tensor]:
    """Token batches `[<= 4, length]` from `source`; see `loopq_compile.sources.self_generated.calibration_data`."""
    from loopq_compile.sources.self_generated import calibration_data

    return calibration_data(source, model, tokenizer, samples, length, seed, cache=cache)


def default_text(method: str, activation: str, loaded: Loaded) -> str | None:
    """`docs` if a method needs calibration text and none is given; None if it needs none, or without a tokenizer."""
    from loopq_compile.compiler import DATA_FREE

    needed = method not in DATA_FREE or activation == "static"
    return "docs" if needed and loaded.tokenizer is not None else None


def names(text: str) -> list[str]:
    """The entries of a comma-separated list."""
    return [part.strip() for part in text.split(",") if part.strip()]


def whole_numbers(option: str, text: str) -> list[int]:
    """The numbers of a comma-separated list."""
    try:
        found = [int(part) for part in names(text)]
    except ValueError as error:
        raise LoopQError(f"{option} takes whole numbers, comma-separated; got {text!r}.") from error
    if any(number < 0 for number in found):
        raise LoopQError(f"{option} takes numbers from 0 on; got {text!r}.")
    return found


def checked_choice(option: str, value: str, choices: Sequence[str]) -> str:
    """`value`, if it is one of `choices`."""
    from loopq_compile.errors import did_you_mean

    if value not in choices:
        raise LoopQError(f"Unknown {option} {value!r}.{did_you_mean(value, choices)}")
    return value


def note(json_output: bool) -> Callable[[str], None]:
    """Prints remarks for people: to standard output, or to standard error if standard output is for JSON."""
    target = console(stderr=json_output)
    target.quiet = follows()
    return lambda text: target.print(text, markup=False)
