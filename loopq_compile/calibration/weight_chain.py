"""The nodes from a stored weight to a quantized one, as a function that may run on some rows at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from loopq_compile.graph.evaluate import sources_of
from loopq_compile.operators import ops
from loopq_compile.operators.straight_through import weight_codes

_NUMBERS, _NUMBERS_ELSEWHERE = 1 << 20, 1 << 24
"""About how many numbers of a weight go through its chain at a time: on a CPU, which has them in its cache, and on
other devices, where every operation must be large."""
_BY_ROW: dict[Any, int] = {
    ops.kronecker.default: 1,
    ops.offset.default: 3,
    ops.dynamic_scale.default: 2,
    ops.fake_quantize.default: 2,
    ops.fake_quantize_dynamic.default: 2,
    torch.ops.aten.mul.Tensor: 1,  # by a diagonal
}
"""How many of an operator's arguments, from the first, have a row for every row of the weight."""

Integers = tuple[Tensor, Tensor]
"""Codes `[N, K]` and scales `[N, groups]` of a weight."""


@dataclass(frozen=True)
class LatentGrid:
    """How a weight that is stored as latent numbers is rounded.

    Args:
        numbers, scale: places of the two stored tensors among what the chain reads.
        fraction: bits behind the point.
        q_min, q_max: range of the integers.
    """

    numbers: int
    scale: int
    fraction: int
    q_min: int
    q_max: int


class WeightChain:
    """The nodes from stored tensors to one quantized weight.

    Args:
        end: the `fake_quantize` or `fake_quantize_dynamic` node.
    """

    def __init__(self, end: fx.Node) -> None:
        self.name = end.name
        self._operator: Any = end.target
        arguments: Any = end.args
        x, scale, *self._limits = arguments
        nodes = sources_of([end]) - {end}
        ordered = [node for node in end.graph.nodes if node in nodes]
        stored = [node for node in ordered if node.op == "get_attr"]
        self._parts = _function(ordered, [x, scale])
        self.latent: LatentGrid | None = None
        if x.target is ops.from_latent.default and set(stored) == {x.args[0], scale} == set(x.args[:2]):
            self.latent = LatentGrid(stored.index(x.args[0]), stored.index(scale), x.args[3], *self._limits[1:])
        by_row = _read_by_row(end)
        self._by_row = [by_row.get(node) for node in stored]
        self.targets = tuple(str(node.target) for node in stored)
        """Names of the stored tensors that the chain reads."""

    @property
    def group_size(self) -> int:
        """Features per scale."""
        return self._limits[0]

    def codes(self, tensors: Sequence[Tensor]) -> Integers:
        """Integers `[N, K]` and scales `[N, groups]` of the weight, without gradients."""
        size, q_min, q_max, *limit = self._limits
        found: list[Integers] = []
        with torch.no_grad(), torch.autocast(tensors[0].device.type, enabled=False):
            for rows in self.parts(tensors):
                x, scale = self._parts(*self.some(tensors, rows))
                if self._operator is ops.fake_quantize_dynamic.default:
                    scale = ops.dynamic_scale(x, scale, size, *limit)
                found.append((weight_codes(x, scale, size, q_min, q_max), scale))
        if len(found) == 1:
            return found[0]
        return torch.cat([codes for codes, _ in found]), torch.cat([scale for _, scale in found])

    def value(self, tensors: Sequence[Tensor]) -> Tensor:
        """The quantized weight `[N, K]`, differentiable with respect to `tensors`; or some rows of it, from `some`."""
        return self._operator(*self._parts(*tensors), *self._limits)

    def parts(self, tensors: Sequence[Tensor]) -> list[slice]:
        """The rows that go through the chain together, in turn; all at once if its operators do not allow less.

        Args:
            tensors: what the chain reads.
        """
        known = list(zip(tensors, self._by_row, strict=True))
        shapes = [x.shape[dim:] for x, dim in known if dim is not None]
        largest = max(shapes, key=math.prod, default=torch.Size())
        alike = all(len(shape) == 2 and shape[0] == largest[0] for shape in shapes)
        # A factor as large as the weight may belong to its rows.
        if not shapes or not alike or any(x.shape[-2:] == largest for x, dim in known if dim is None):
            return [slice(None)]
        count, most = largest[0], _NUMBERS if tensors[0].device.type == "cpu" else _NUMBERS_ELSEWHERE
        size = -(-count // -(-math.prod(largest) // most))
        return [slice(begin, begin + size) for begin in range(0, count, size)]

    def dim(self, place: int) -> int | None:
        """Where the tensor at this place of `targets` has the rows of the weight; None if it has none."""
        return self._by_row[place]

    def some(self, tensors: Sequence[Tensor], rows: slice) -> list[Tensor]:
        """What the chain reads for some rows of its weight."""
        if rows == slice(None):
            return list(tensors)
        return [
            x if dim is None else x[(slice(None),) * dim + (rows,)]
            for x, dim in zip(tensors, self._by_row, strict=True)
        ]


def _function(nodes: Sequence[fx.Node], results: Sequence[fx.Node]) -> fx.GraphModule:
    """Computes `results` from all stored tensors among `nodes`, in their order."""
    graph, copied = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in nodes:
        if node.op == "get_attr":
            copied[node] = graph.placeholder(node.name)
    for node in nodes:
        if node.op != "get_attr":
            copied[node] = graph.node_copy(node, copied.__getitem__)
    graph.output(tuple(copied[node] for node in results))
    graph.eliminate_dead_code()
    return fx.GraphModule(torch.nn.Module(), graph)


def _read_by_row(end: fx.Node) -> dict[fx.Node, int | None]:
    """By stored tensor of a chain, the dimension that has the rows of the weight; None for what all rows read. Empty if
    the chain does not tell."""
    found: dict[fx.Node, int | None] = {}
    stack: list[tuple[Any, int | None]] = [(end, 0)]
    while stack:
        node, dim = stack.pop()
        if not isinstance(node, fx.Node):
            continue
        if node.op == "get_attr":
            if found.setdefault(node, dim) != dim:
                return {}
        elif dim is None:
            stack.extend((argument, None) for argument in node.all_input_nodes)
        elif node.target is torch.ops.aten.select.int and dim == 0 and node.args[1] == 0:
            stack.append((node.args[0], 1))
        elif node.target in _BY_ROW and dim == 0:
            count = _BY_ROW[node.target]
            stack += [(argument, 0 if place < count else None) for place, argument in enumerate(node.args)]
        else:
            return {}
    return found
