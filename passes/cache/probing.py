"""Runs single nodes of a graph on small random tensors, which replaces a rule for every operator.

A captured graph has symbolic sizes, so a node can be run for any number of tokens. If an operator has no rule,
running it on all tokens and on the last ones shows whether it computes each token only from that token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from loopq_compile.graph.constants import constant_nodes, evaluate
from loopq_compile.passes.cache.cache_regions import Regions

BATCH = 2
"""Rows of a batch in a probe."""
_TOLERANCE = 1e-5
_LARGE = 1 << 20
_DOUBLE = {torch.float32: torch.float64, torch.float16: torch.float64, torch.bfloat16: torch.float64}
_DOUBLE[torch.complex64] = torch.complex128


@dataclass(frozen=True)
class Place:
    """Where a tensor holds its tokens: entry `i` of `axis` (size `outer * sequence * inner`) has token
    `i // inner % sequence`.

    `inner` is 1 unless the sequence was merged with other axes, as `[sequence * batch, width]` is.
    """

    axis: int
    inner: Any = sympy.S.One


class Probe:
    """Makes random tensors with the shapes of nodes, and runs nodes on them."""

    def __init__(self, regions: Regions) -> None:
        self.regions = regions
        self.generator = torch.Generator().manual_seed(0)
        self.constants = constant_nodes(regions.graph_module.graph)
        inputs = [node for node in (regions.ids, regions.mask) if node is not None]
        batches = [node.meta["val"].shape[0] for node in inputs]
        self.rows = {size.node.expr: BATCH for size in batches if not isinstance(size, int)}

    def number(self, size: Any, length: int) -> Any:
        """A size for `length` tokens; None if it depends on values of tensors."""
        expression = getattr(getattr(size, "node", None), "expr", size)
        if not isinstance(expression, sympy.Basic):
            return expression
        found = expression.subs({self.regions.symbol: length, **self.rows})
        if found.free_symbols:
            return None
        return float(found) if isinstance(size, torch.SymFloat) else bool(found) if found.is_Boolean else int(found)

    def random(self, node: fx.Node, length: int) -> Tensor:
        """A tensor like the result of `node` for `length` tokens, in double precision; integers are 0 and 1."""
        value = node.meta["val"]
        if node in self.constants and not (value.is_floating_point() or value.is_complex()):
            return dict(evaluate(self.regions.graph_module, [node]))[node]
        shape = [self.number(size, length) for size in value.shape]
        dtype = _DOUBLE.get(value.dtype, value.dtype)
        if node in self.constants and value.numel() > _LARGE:
            # Weights of many experts, for instance: all equal, so that they take no memory.
            return torch.randn(shape[-2:], generator=self.generator, dtype=dtype).to(value.device).expand(shape)
        if value.is_floating_point() or value.is_complex():
            return torch.randn(shape, generator=self.generator, dtype=dtype).to(value.device)
        return torch.randint(0, 2, shape, generator=self.generator).to(value.device, dtype)

    def run(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        """The result of `node` on `values`; types among its arguments become double precision, too."""
        target: Any = node.target
        args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
        doubled = torch.fx.node.map_aggregate(
            (args, kwargs), lambda value: _DOUBLE.get(value, value) if isinstance(value, torch.dtype) else value
        )
        args, kwargs = doubled  # type: ignore[misc]
        with torch.no_grad():
            return target(*args, **kwargs)


def last_tokens(tensor: Tensor, place: Place, inner: int, length: int, count: int) -> Tensor:
    """The last `count` of `length` tokens of `tensor`, of which `inner` is `place.inner` as a number."""
    split = tensor.unflatten(place.axis, (-1, length, inner))
    return split.narrow(place.axis + 1, length - count, count).flatten(place.axis, place.axis + 2)


def same(first: Any, second: Any) -> bool:
    """Whether two results are equal up to rounding."""
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return first == second
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    if not (first.is_floating_point() or first.is_complex()):
        return first.equal(second)
    return torch.allclose(first, second, rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True)
