"""`compile`: a looped model goes in, a quantized program comes out."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from loopq_compile.artifact import read
from loopq_compile.capture import capture, check_model
from loopq_compile.errors import LoopQError
from loopq_compile.pipeline import Pipeline
from loopq_compile.pipelines import get_pipeline
from loopq_compile.program import Program
from loopq_compile.scheme import Scheme
from loopq_compile.shapes import infer_shapes
from loopq_compile.state import get_state

DATA_FREE = ("symmetric",)
"""Methods that need no calibration data with dynamic scales; weight-only schemes never do."""


def compile(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    scheme: str | Scheme = "w4a4",
    method: str | Pipeline = "loopq",
    calibration: Any = None,
    **options: Any,
) -> Program:
    """Captures `model`, finds its loops, and quantizes it.

    Args:
        model: the module; it is not changed, and its weights are shared where they stay in floating point.
        example_inputs: a tensor, a tuple of positional or a dict of keyword inputs; batch and sequence become dynamic.
            Hugging Face causal language models need none.
        scheme: "w4a4", any "w{2..8}a{2..8,16}", or a `Scheme`.
        method: "symmetric", "las", "loopq", or a `Pipeline`.
        calibration: iterable of token tensors `[batch, sequence]` (or tuples, dicts of inputs), read once. May be left
            out for `method="symmetric"` with dynamic scales and for weight-only schemes.
        options: fields of `Scheme` to change, such as `group_size=64` or `skip=("*.o_proj",)`.

    Returns:
        A `Program` that is called like the model.

    Raises:
        LoopQError: bad input; the message says what and where.
        CaptureError: the model cannot be captured.
    """
    check_model(model)
    for name in [name for name in ("steps", "seed") if name in options]:
        raise LoopQError(f"{name}= is an option of learned methods, which this version does not have; leave it out.")
    scheme = Scheme.parse(scheme, **options)
    pipeline = get_pipeline(method)
    needs_data = scheme.quantizes_activations and (scheme.activation == "static" or pipeline.name not in DATA_FREE)
    if calibration is None and needs_data and pipeline.name != "custom":
        raise LoopQError(
            f"method={pipeline.name!r} with {scheme.activation} {scheme.name} needs calibration data: calibration="
            "[token tensors of shape [batch, sequence]]. Without data use method='symmetric' with dynamic scales, or a "
            "weight-only scheme such as 'w4a16'."
        )
    graph_module = capture(model, example_inputs)
    return quantize(graph_module, scheme, pipeline, calibration)


def quantize(graph_module: Any, scheme: Scheme, pipeline: Pipeline, calibration: Any = None) -> Program:
    """Runs `pipeline` on a captured graph, which it changes in place."""
    state = get_state(graph_module)
    state.scheme, state.method, state.calibration = scheme, pipeline.name, calibration
    try:
        graph_module = pipeline.run(graph_module)
        infer_shapes(graph_module)
    finally:
        state.calibration = None
    return Program(graph_module)


def load(directory: str | os.PathLike[str]) -> Program:
    """Reads a program written by `Program.save`.

    Raises:
        LoopQError: the folder is no program, was written by a newer version, or is damaged.
    """
    return Program(read(directory))
