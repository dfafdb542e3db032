"""The command line: `loopq-compile`. One module per command; heavy imports happen when a command runs."""

from __future__ import annotations

import os

import typer

from loopq_compile.cli import bench, bisect, compile, demo, evaluate, export, generate, inspect, report, verify
from loopq_compile.cli.common import Commands

__all__ = ["app", "main"]

app = typer.Typer(
    cls=Commands,
    rich_markup_mode="markdown",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Quantizes looped language models (LoopQ) and lowers them to ONNX.

    A looped model runs one block of layers several times. Start with `loopq-compile demo`, which takes the small looped
    language model inside this package through all steps; then `compile` one of your own.

    A MODEL is one of: the word "bundled"; a Hugging Face folder or hub id; a folder written by `compile`; an .onnx file
    or the folder written by `export`.

    Exit status: 0 success; 1 an error, and the message says what to do; 2 a wrong option; 3 a check failed (`bisect
    --limit`); 70 a defect of this program or of a custom pass; 130 interrupted.
    """,
)
app.command("demo")(demo.demo)
app.command("compile")(compile.compile_command)
app.command("inspect")(inspect.inspect_command)
app.command("eval")(evaluate.eval_command)
app.add_typer(bench.app, name="bench")
app.command("export")(export.export_command)
app.command("generate")(generate.generate_command)
app.command("report")(report.report_command)
app.command("verify")(verify.verify_command)
app.command("bisect")(bisect.bisect_command)


def _version(asked: bool) -> None:
    if asked:
        from loopq_compile._version import __version__

        typer.echo(f"loopq-compile {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


WAIT_POLICY = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Environment variables that control how OpenMP threads wait."""


def wait_passively() -> None:
    """Lets OpenMP threads sleep while they wait, unless the user chose how they wait.

    On a busy machine, threads that wait actively take the processor from the thread that they wait for. OpenMP reads
    the environment when its library loads, so call this before anything imports torch. Processes started later inherit
    it.
    """
    if not any(name in os.environ for name in WAIT_POLICY):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def main() -> None:
    """Entry point of the `loopq-compile` program."""
    wait_passively()
    app(prog_name="loopq-compile")
