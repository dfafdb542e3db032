"""Programs to calibrate: the tiny looped model after the passes of a learned method, without the calibration."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, fx, nn

import loopq_compile as lq
from loopq_compile.capture.to_graph import capture
from loopq_compile.graph.options import CalibrationOptions
from loopq_compile.graph.state import copy_graph, get_state, get_tensor
from loopq_compile.operators.precision import wide
from loopq_compile.passes.loops.tag_loops import TagLoops
from loopq_compile.passes.quantize.annotate_linears import AnnotateLinears
from loopq_compile.passes.quantize.collect_ranges import CollectRanges
from loopq_compile.passes.quantize.insert_activation_qdq import InsertActivationQdq
from loopq_compile.passes.quantize.latent_weights import LatentWeights
from loopq_compile.passes.quantize.quantize_weights import QuantizeWeights
from loopq_compile.passes.quantize.set_ranges import SetRanges
from loopq_compile.passes.transforms.insert_adapters import InsertAdapters
from loopq_compile.passes.transforms.insert_las import InsertLas
from loopq_compile.passes.transforms.insert_transforms import InsertTransforms
from loopq_compile.pipeline import Pipeline
from tests.tiny import tiny_model, tokens


@functools.cache
def captured(loops: int = 2, layers: int = 1) -> fx.GraphModule:
    """The tiny model's graph; shared, so copy it."""
    return capture(tiny_model(loops, layers), tokens())


def prepared(
    *passes,
    loops: int = 2,
    layers: int = 1,
    model: nn.Module | None = None,
    example=None,
    data=None,
    scheme: str = "w4a4",
    activation: str = "dynamic",
    adapters: bool = True,
    rounding: bool = False,
    transforms: bool = True,
    learn: str = "transform",
    **options,
) -> fx.GraphModule:
    """A quantized graph with what can be learned in it, and its teacher and data in its state; latent weights take the
    place of weights and their transforms if their `rounding` is to be learned."""
    source = captured(loops, layers) if model is None else capture(model, tokens() if example is None else example)
    graph_module = copy_graph(source)
    state = get_state(graph_module)
    state.scheme = lq.Scheme.parse(scheme, activation=activation, group_size=16)
    state.method = "test"
    state.run.calibration = [tokens(seed, 4) for seed in range(6)] if data is None else data
    state.options = CalibrationOptions(**{"steps": 4, "evaluate_every": 2, "validation": 0.34} | options)
    state.run.teacher = copy_graph(graph_module)
    front = [TagLoops(), AnnotateLinears()]
    if transforms:
        front.append(InsertTransforms(learn=learn, init="hadamard" if learn == "orthogonal" else "identity"))
    front += [CollectRanges(), QuantizeWeights(learnable=True)]
    front += [InsertActivationQdq(), InsertLas(), SetRanges()]
    if adapters:
        front.append(InsertAdapters())
    if rounding:
        front.append(LatentWeights())
    return Pipeline([*front, *passes]).run(graph_module)


def learned_tensors(graph_module: fx.GraphModule) -> dict[str, Tensor]:
    """Everything in the graph that calibration may change, by name."""
    return {
        str(node.target): wide(get_tensor(graph_module, str(node.target))).clone(memory_format=torch.contiguous_format)
        for node in graph_module.graph.nodes
        if node.op == "get_attr" and ("loopq_learn" in node.meta or "loopq_group" in node.meta)
    }


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Both hold the same bits."""
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.equal(second[name]), name


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """The largest difference of any entry."""
    return max(float((tensor - second[name]).abs().max()) for name, tensor in first.items())
