"""`compile`: turns a looped model into a quantized program."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from loopq_compile.calibration.batches import calibration_batches, guarded
from loopq_compile.calibration.preflight import check, says_how_to_go_on
from loopq_compile.capture.model_checks import check_deterministic, check_model
from loopq_compile.capture.surroundings import undisturbed
from loopq_compile.capture.to_graph import capture
from loopq_compile.errors import LoopQError, did_you_mean
from loopq_compile.graph.device import CPU, device_of, find_device, place
from loopq_compile.graph.options import CalibrationOptions
from loopq_compile.graph.scheme import Scheme
from loopq_compile.graph.shapes import infer_shapes
from loopq_compile.graph.state import RunContext, copy_graph, get_state
from loopq_compile.memory import LARGE, available_memory, bound_heap, trim
from loopq_compile.methods import get_pipeline, reference_graph
from loopq_compile.passes.learn.requirements import Work, check_fits, kind_of
from loopq_compile.pipeline import Pipeline
from loopq_compile.planning.budget import settle_steps
from loopq_compile.program import Program, failures_with_programs
from loopq_compile.storage.artifact import read

DATA_FREE = ("symmetric", "quarot")
"""Methods that need no calibration data with dynamic scales and `weight_solver="rtn"`."""


def compile(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    scheme: str | Scheme = "w4a4",
    method: str | Pipeline = "loopq",
    calibration: Any = None,
    device: str | torch.device | None = None,
    release_model: bool = False,
    **options: Any,
) -> Program:
    """Captures `model`, finds its loops, and quantizes it.

    Args:
        model: the module; it is not changed (but see `release_model`). Weights that stay in floating point are shared.
        example_inputs: a tensor, a tuple of positional or a dict of keyword inputs; batch and sequence become dynamic.
            Hugging Face causal language models need none.
        scheme: "w4a4", any "w{2..8}a{2..8,16}", or a `Scheme`.
        method: a name from `loopq_compile.methods.METHODS`, or a `Pipeline`.
        calibration: iterable of token tensors `[batch, sequence]` (or tuples, dicts of inputs). May be left out for
            `method="symmetric"` and "quarot" with dynamic scales, and for weight-only schemes, which then round to
            nearest.
        device: where the program is made, and where it lies afterwards: "auto" (a GPU if there is one), "cpu", "cuda",
            "cuda:1". None: where the model lies. The model stays where it is; batches may lie anywhere.
        release_model: whether to free each of the model's weights as its integers are stored, or as it is copied to
            another `device`, which keeps memory near one copy of the model. Neither the model nor anything that shares
            its weights can be used afterwards.
        options: fields of `Scheme` to change, such as `group_size=64` or `skip=("*.o_proj",)`, and of
            `CalibrationOptions`, such as `steps=300` or `minutes=30`, `seed=1`, `weight_solver="gptq"` or
            `checkpoint="folder"`.

    Returns:
        A `Program` that is called like the model.

    Raises:
        LoopQError: the input is bad; the message says what and where.
        CaptureError: the model cannot be captured.
    """
    check_model(model)
    wanted = None if device is None else find_device(device)
    ours = {name: options.pop(name) for name in list(options) if name in CalibrationOptions.names()}
    _check_names(options)
    scheme, calibration_options = Scheme.parse(scheme, **options), CalibrationOptions(**ours)
    pipeline = get_pipeline(method)
    needs_data = scheme.quantizes_activations and (scheme.activation == "static" or pipeline.name not in DATA_FREE)
    if calibration is None and needs_data and pipeline.name != "custom":
        raise LoopQError(
            f"method={pipeline.name!r} with {scheme.activation} {scheme.name} needs calibration data: calibration="
            "[token tensors of shape [batch, sequence]]. Without data use method='symmetric' with dynamic scales, or a "
            "weight-only scheme such as 'w4a16'."
        )
    if calibration is None and isinstance(method, str) and pipeline.name not in DATA_FREE:
        warnings.warn(
            f"Without calibration data {scheme.name} rounds to nearest: {method!r} learns nothing.", stacklevel=2
        )
        pipeline = get_pipeline("symmetric")
    graph_module = capture(model, example_inputs)
    place(graph_module, wanted or device_of(model), release_model)
    get_state(graph_module).run.release_model = release_model
    return quantize(graph_module, scheme, pipeline, calibration, calibration_options)


def quantize(
    graph_module: Any,
    scheme: Scheme,
    pipeline: Pipeline,
    calibration: Any = None,
    options: CalibrationOptions | None = None,
) -> Program:
    """Runs `pipeline` on a captured graph, which it changes in place."""
    with undisturbed(CPU, torch.float32):
        return _quantize(graph_module, scheme, pipeline, calibration, options or CalibrationOptions())


def _quantize(
    graph_module: Any, scheme: Scheme, pipeline: Pipeline, calibration: Any, options: CalibrationOptions
) -> Program:
    check(graph_module, options)
    if calibration is not None:
        check_deterministic(graph_module.graph)
    state = get_state(graph_module)
    state.scheme, state.method, state.options = scheme, pipeline.name, options
    state.run.calibration = _repeatable(calibration)
    state.run.teacher = copy_graph(graph_module)
    if sum(tensor.numel() for tensor in graph_module.parameters()) > LARGE:
        bound_heap()
        _check_memory(graph_module, scheme, pipeline)
    try:
        if options.minutes is not None:
            settle_steps(graph_module, pipeline)
        with says_how_to_go_on(state), failures_with_programs():
            graph_module = pipeline.run(graph_module)
        infer_shapes(graph_module)
    finally:
        state.run.close()
        state.run = RunContext()
        trim()
    return Program(graph_module)


def _check_memory(graph_module: Any, scheme: Scheme, pipeline: Pipeline) -> None:
    """Refuses what would not fit into memory, before hours are spent on it."""
    state, device = get_state(graph_module), device_of(graph_module)
    if state.run.calibration is None or not any(kind_of(item, state.options) for item in pipeline):
        return
    batches = list(calibration_batches(state.run.calibration, state.signature, None))
    work = Work.of(reference_graph(graph_module, scheme), batches, state.options)
    warning = check_fits(work, list(pipeline), state.options, available_memory(device))
    if warning:
        warnings.warn(warning, stacklevel=4)


def _repeatable(calibration: Any) -> Any:
    """The batches, as a list if they can be read only once, since several passes read them."""
    if isinstance(calibration, Iterator):
        return list(guarded(calibration))
    return calibration


def _check_names(options: dict[str, Any]) -> None:
    known = {field.name for field in dataclasses.fields(Scheme)} | CalibrationOptions.names()
    for name in options:
        if name not in known:
            raise LoopQError(f"compile has no option {name!r}.{did_you_mean(name, known)}")


def load(directory: str | os.PathLike[str], device: str | torch.device = "cpu") -> Program:
    """Reads a program written by `Program.save`, on whatever device it was made.

    Args:
        directory: the folder.
        device: where the program shall lie; as in `Program.to`.

    Raises:
        LoopQError: the folder is not a program, was written by a newer version, or is damaged; or there is no such
            device.
    """
    wanted = find_device(device)
    return Program(read(directory)).to(wanted)
