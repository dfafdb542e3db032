"""Checks before the first pass, so that a run of hours does not end in an error that was visible from the start."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import fx

from loopq_compile.errors import InternalError, LoopQError
from loopq_compile.graph.options import CalibrationOptions
from loopq_compile.graph.state import CompilerState, get_tensor


def check(graph_module: fx.GraphModule, options: CalibrationOptions) -> None:
    """Refuses options that do not fit a captured graph.

    Raises:
        LoopQError: `precision` does not fit the model's type, or the checkpoint folder cannot be written.
    """
    types = {
        get_tensor(graph_module, str(node.args[1].target)).dtype
        for node in graph_module.graph.nodes
        if node.target is torch.ops.aten.linear.default and node.args[1].op == "get_attr"
    }
    other = types - {torch.float32, torch.bfloat16}
    if options.precision == "bfloat16" and other:
        kind = str(other.pop()).removeprefix("torch.")
        raise LoopQError(
            f"precision='bfloat16' is for float32 models, and this one computes in {kind}. Leave the option out, or "
            "convert the model to float32 or bfloat16."
        )
    if options.checkpoint is not None:
        folder = Path(options.checkpoint)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise LoopQError(f"Cannot write checkpoints to {folder}: {error.strerror or error}.") from error


@contextlib.contextmanager
def says_how_to_go_on(state: CompilerState) -> Iterator[None]:
    """Adds to an error after a phase of calibration where the result is, or how to keep it next time."""
    try:
        yield
    except (LoopQError, InternalError) as error:
        folder = state.options.checkpoint
        if state.results.get("calibration") or state.results.get("blocks"):
            hint = (
                f"What was learned before is kept in {folder}: compile again with the same model, data and options, "
                "and it goes on from there."
                if folder
                else "With checkpoint='folder' (--checkpoint) what was learned before such an error is kept."
            )
            error.args = (f"{str(error).rstrip()} {hint}",)
        raise
