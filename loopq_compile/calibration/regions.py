"""Elementwise regions of a graph, each of which calibration runs as one compiled function.

Norms, rotary positions, gates and residual sums are a third of a step when every operator reads and writes whole
tensors. A region is a largest connected set of such operators between matrix products. Regions with the same operators
share one function, so that a model of many equal layers compiles a handful.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.partitioner import CapabilityBasedPartitioner
from torch.fx.passes.operator_support import OperatorSupportBase

from loopq_compile.operators.fusion import fused, is_fusing

_aten = torch.ops.aten
_NORMS = {_aten.rms_norm.default, _aten.layer_norm.default}
_ROWS = {
    _aten.mean.dim,
    _aten.cat.default,
    _aten.clone.default,
    _aten.contiguous.default,
    _aten.to.dtype,
    _aten._to_copy.default,
}
_VIEWS = {
    _aten.view.default,
    _aten.reshape.default,
    _aten.unsqueeze.default,
    _aten.transpose.int,
    _aten.permute.default,
    _aten.expand.default,
    _aten.slice.Tensor,
    _aten.select.int,
}
_SHAPES = 6
"""A region is compiled for this many combinations of shapes; further ones share a function for all shapes."""


class Region(nn.Module):
    """Runs elementwise operators as one function inside `fusing`, and one by one outside.

    Args:
        graph_module: the operators; it holds no tensors.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__()
        self._plain = graph_module
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def forward(self, *inputs: Any) -> Any:
        """The results of the region, a tensor or a tuple of them."""
        if not is_fusing():
            return self._plain(*inputs)
        shapes: Any = tuple(x.shape if isinstance(x, Tensor) else x for x in inputs)
        if shapes not in self._compiled and len(self._compiled) >= _SHAPES:
            shapes = None
        if shapes not in self._compiled:
            self._compiled[shapes] = fused(fx.GraphModule(nn.Module(), self._plain.graph).forward)
        return self._compiled[shapes](*inputs)


_known: dict[str, Region] = {}


def fuse_regions(graph_module: fx.GraphModule) -> None:
    """Puts a `Region` in the place of every set of elementwise operators that is worth it."""
    partitioner = CapabilityBasedPartitioner(graph_module, _Elementwise(), allows_single_node_partition=True)
    partitions = [found for found in partitioner.propose_partitions() if _is_worth(found.nodes)]
    partitioner.fuse_partitions(partitions, prefix="region_")
    for node in graph_module.graph.nodes:
        if node.op == "call_module" and node.target.startswith("region_"):
            module: Any = graph_module.get_submodule(node.target)
            setattr(graph_module, node.target, _known.setdefault(_structure(module.graph), Region(module)))
    graph_module.recompile()


class _Elementwise(OperatorSupportBase):
    def is_node_supported(self, submodules: Mapping[str, nn.Module], node: fx.Node) -> bool:
        if node.op != "call_function":
            return False
        return node.target in _VIEWS or _computes(node)


def _computes(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return node.target in _NORMS or node.target in _ROWS or torch.Tag.pointwise in tags


def _is_worth(nodes: Any) -> bool:
    """Whether a region saves a pass over a tensor."""
    return any(node.target in _NORMS for node in nodes) or sum(map(_computes, nodes)) > 1


def _structure(graph: fx.Graph) -> str:
    """Text that is the same for graphs that compute the same."""
    numbers = {node: f"%{number}" for number, node in enumerate(graph.nodes)}
    lines = [
        f"{node.target if node.op == 'call_function' else node.op} {_text([node.args, *node.kwargs.items()], numbers)}"
        for node in graph.nodes
    ]
    return "\n".join(lines)


def _text(arguments: Any, numbers: dict[fx.Node, str]) -> str:
    if isinstance(arguments, fx.Node):
        return numbers[arguments]
    if isinstance(arguments, tuple | list):
        return "(" + ", ".join(_text(item, numbers) for item in arguments) + ")"
    return repr(arguments)
