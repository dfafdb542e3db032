"""Finds numbers beyond float16 right after the pass that causes them, and names that pass.

float16 ends at 65504. Rotations, smoothing and factors that move between weights and activations may exceed it, and
a quantizer turns infinite values into ordinary-looking integers. After every pass that changes a float16 program, a
few tokens therefore run through it. Every node must be finite where it is finite in the captured model.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from loopq_compile.calibration.batches import calibration_batches
from loopq_compile.errors import LoopQError
from loopq_compile.graph.device import device_of
from loopq_compile.graph.evaluate import run
from loopq_compile.graph.keys import MADE_BY, SITE
from loopq_compile.graph.loops import get_tag
from loopq_compile.graph.signature import InputSpec
from loopq_compile.graph.state import get_state, get_tensor
from loopq_compile.operators import ops

_SIZES = {"batch": 2}
_LENGTH = 32
"""Sizes of the test inputs, for dimensions that may vary."""
_ADVICE = "Convert the model to bfloat16 or float32 (model.bfloat16(), --dtype bfloat16), or use method='symmetric'."


class Probe:
    """Watches one run of a pipeline.

    Args:
        graph_module: the captured graph, before any pass.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self._inputs: list[Tensor] | None = None
        self._known: set[str] = set()
        if any(tensor.dtype == torch.float16 for tensor in stored(graph_module)):
            inputs = example(graph_module)
            with contextlib.suppress(Exception):  # nothing is watched if made-up inputs do not fit the model
                self._known = {node.name for node in origins(graph_module, inputs)}
                self._inputs = inputs
            own = sorted(self._known - _masks(graph_module))
            if own:
                warnings.warn(
                    f"The model itself becomes NaN or infinite in float16, at node {own[0]!r}, before any pass. "
                    "Load it in bfloat16 or float32.",
                    stacklevel=2,
                )

    def check(self, graph_module: fx.GraphModule, pass_name: str) -> None:
        """Refuses a graph in which a node becomes NaN or infinite that is finite in the captured model.

        Raises:
            LoopQError: there is one; the message names the pass, the node, its loop and its linear.
        """
        if self._inputs is None:
            return
        node = next((n for n in origins(graph_module, self._inputs) if n.name not in self._known), None)
        if node is not None:
            raise LoopQError(_message(f"Pass {pass_name!r}", node))


def cause(graph_module: fx.GraphModule, inputs: Sequence[Tensor]) -> str | None:
    """Why a graph changed by passes is not finite on `inputs`; None if the captured model is not finite either."""
    teacher = get_state(graph_module).run.teacher
    if teacher is None or {node.name for node in origins(teacher, inputs)} - _masks(teacher):
        return None
    node = next(iter(origins(graph_module, inputs)), None)
    return None if node is None else _message(f"Pass {node.meta.get(MADE_BY, 'before')!r}", node)


def _masks(graph_module: fx.GraphModule) -> set[str]:
    """Nodes that may be infinite: no linear's result reaches them."""
    reached: set[fx.Node] = set()
    for node in graph_module.graph.nodes:
        if node.target is torch.ops.aten.linear.default or any(n in reached for n in node.all_input_nodes):
            reached.add(node)
    return {node.name for node in graph_module.graph.nodes if node not in reached}


def _message(who: str, node: fx.Node) -> str:
    tag, site = get_tag(node), node.meta.get(SITE)
    where = ", ".join(filter(None, [f"of {site!r}" if site else "", str(tag) if tag else ""]))
    return (
        f"{who} makes numbers that the model's type does not hold (float16 ends at 65504): node {node.name!r}"
        f"{f' ({where})' if where else ''} becomes NaN or infinite, and the captured model does not. {_ADVICE}"
    )


def stored(graph_module: fx.GraphModule) -> list[Tensor]:
    """The tensors that a graph computes with, without rounding offsets, whose type is not the model's."""
    nodes = [node for node in graph_module.graph.nodes if node.op == "get_attr"]
    return [get_tensor(graph_module, str(node.target)) for node in nodes if not all(map(_is_offset, node.users))]


def _is_offset(node: fx.Node) -> bool:
    return node.target is ops.offset.default


def origins(graph_module: fx.GraphModule, inputs: Sequence[Tensor]) -> list[fx.Node]:
    """The nodes that produce NaN or infinite values from finite ones, in graph order."""
    found: list[fx.Node] = []
    bad: set[fx.Node] = set()

    def look(node: fx.Node, value: Any) -> None:
        numbers = node.op != "output" and isinstance(value, Tensor) and value.is_floating_point()
        if numbers and not bool(torch.isfinite(value).all()):
            bad.add(node)
            if bad.isdisjoint(node.all_input_nodes):
                found.append(node)

    run(graph_module, inputs, look)
    return found


def example(graph_module: fx.GraphModule) -> list[Tensor]:
    """Inputs to try a graph on: the beginning of the calibration data, or random ones if there is no data."""
    state, device = get_state(graph_module), device_of(graph_module)
    if state.run.calibration is not None:
        batch = next(calibration_batches(state.run.calibration, state.signature, None, device))
        return [_beginning(tensor, spec) for tensor, spec in zip(batch, state.signature.inputs, strict=True)]
    generator = torch.Generator().manual_seed(0)
    specs = state.signature.inputs
    return [_random(spec, _rows(graph_module, spec.name), generator).to(device) for spec in specs]


def _beginning(tensor: Tensor, spec: InputSpec) -> Tensor:
    for dim, size in enumerate(spec.shape):
        if isinstance(size, str):
            tensor = tensor.narrow(dim, 0, min(tensor.shape[dim], _SIZES.get(size, _LENGTH)))
    return tensor


def _rows(graph_module: fx.GraphModule, name: str) -> int:
    """How many values an integer input may take: the rows of the tables that it indexes."""
    tables = [
        node.args[0]
        for node in graph_module.graph.nodes
        if node.target is torch.ops.aten.embedding.default and node.args[1].name == name
    ]
    return min((get_tensor(graph_module, str(t.target)).shape[0] for t in tables if t.op == "get_attr"), default=2)


def _random(spec: InputSpec, rows: int, generator: torch.Generator) -> Tensor:
    shape = [size if isinstance(size, int) else _SIZES.get(size, _LENGTH) for size in spec.shape]
    if spec.dtype.is_floating_point or spec.dtype.is_complex:
        return torch.randn(shape, generator=generator).to(spec.dtype)
    if spec.dtype is torch.bool or spec.name == "attention_mask":
        return torch.ones(shape, dtype=spec.dtype)
    if spec.name == "position_ids":
        return torch.arange(shape[-1], dtype=spec.dtype).expand(shape).contiguous()
    return torch.randint(rows, shape, generator=generator).to(spec.dtype)
