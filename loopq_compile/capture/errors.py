"""Explains why a model cannot be captured: the line of its source, and what to do."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence

import torch
from torch import nn

_PYTORCH = os.path.dirname(torch.__file__)
_CAPTURE = os.path.dirname(__file__)


def model_frames(frames: Sequence[traceback.FrameSummary]) -> list[traceback.FrameSummary]:
    """The frames below the capture that belong neither to PyTorch nor to this package."""
    ours = [i for i, frame in enumerate(frames) if frame.filename.startswith(_CAPTURE)]
    return [
        frame
        for i, frame in enumerate(frames)
        if i > max(ours[:1], default=-1) and not frame.filename.startswith((_PYTORCH, _CAPTURE, "<"))
    ]


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Hides what the exporter prints about a graph that it cannot finish; the error says what matters."""
    printed = io.StringIO()
    log = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(printed):
            yield
    finally:
        log.setLevel(level)
    sys.stderr.write(printed.getvalue())  # after a success, show what the model's own code wrote


def explain(model: nn.Module, error: Exception, fixed_at: Sequence[traceback.FrameSummary]) -> str:
    """What went wrong, at which line of the model's source, and what to do."""
    text = str(error)
    frames = model_frames(traceback.extract_tb(error.__traceback__)) or list(fixed_at)
    where = re.search(r'File "([^"]+)", line (\d+), in (\w+)\n\s*(.+)', text.split("User code", 1)[-1])
    if frames:
        place = f"{frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}: {frames[-1].line}"
    elif where:
        place = f"{where[1]}:{where[2]} in {where[3]}: {where[4]}"
    else:
        place = "unknown source line"
    advice = _advice(error, text)
    first = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    return f"Cannot capture {type(model).__name__} at {place}\n{advice}\n{type(error).__name__}: {first[:600]}"


def _advice(error: Exception, text: str) -> str:
    if "data-dependent" in text or "GuardOnDataDependent" in type(error).__name__:
        return (
            "The control flow depends on tensor values. Replace the branch by torch.where or torch.cond, or fix the "
            "number of loops (for early exit: run all loops and keep the gate as an output)."
        )
    if "Constraints violated" in text or "specializ" in text.lower():
        return (
            "The model fixes the batch size or sequence length to a constant. Use x.shape instead of the number, "
            "x.reshape(x.shape[0], ...) instead of x.view(2, ...)."
        )
    if "not a known type" in text:
        return (
            "The model returns an object that torch.export does not know. Return tensors, tuples, lists or dicts, "
            "register the class with torch.export.register_dataclass, or switch off the cache (use_cache=False)."
        )
    if "Cannot call sizes() on tensor with symbolic sizes" in text:
        return (
            "This release of PyTorch cannot export nested torch.vmap of a linear layer. Use torch 2.13 or newer, or "
            "write the computation with broadcasting."
        )
    if isinstance(error, TypeError | IndexError) or "size mismatch" in text or "shape" in text:
        return "Check that model(**example_inputs) itself runs with these inputs."
    return "Check that torch.export.export(model, ...) works on it; its own message follows."
