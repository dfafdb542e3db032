"""`loopq-compile demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loopq_compile.cli.common import Json, console, print_json


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for what is written.")] = Path(
        "demo-output"
    ),
    max_tokens: Annotated[int, typer.Option(min=64, help="Held-out tokens to measure on; more takes longer.")] = 16384,
    samples: Annotated[int, typer.Option(min=1, help="Calibration samples of 128 tokens.")] = 512,
    steps: Annotated[
        int, typer.Option(min=1, help="Optimizer steps of loopq; more take longer and serve quality.")
    ] = 36,
    readme: Annotated[
        Path | None,
        typer.Option("--readme", metavar="FILE", help="Rewrite the figures of this document with those of the run."),
    ] = None,
    json: Json = False,
) -> None:
    """Take the bundled looped language model through all steps: a few minutes on two cores.

    Captures it, finds its loops, quantizes it in several ways and measures each on held-out text, exports LoopQ's
    program with four-bit weights and activations to ONNX, and lets ONNX Runtime write text with it.
    """
    from loopq_compile.bench.demo import Demo

    told = console(stderr=json)
    results = Demo(out, max_tokens=max_tokens, samples=samples, steps=steps, readme=readme, console=told).run()
    if json:
        print_json(results)
