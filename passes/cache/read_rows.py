"""`read-rows`: reading several tokens in one call rounds as reading them one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from loopq_compile.graph.shapes import infer_shapes
from loopq_compile.operators import ops
from loopq_compile.passes.base import Pass, PassResult

_aten = torch.ops.aten
_PRODUCTS = {_aten.linear.default, ops.kronecker.default, ops.transition_adapter.default, ops.compensate.default}
_ATTENTION = {_aten.scaled_dot_product_attention.default, ops.cached_attention.default}
_ROUNDING = {ops.quantize.default, ops.dynamic_scale.default, ops.quantize_cache.default}
_DONE = "by_row"


class ReadRows(Pass):
    """Computes products and attention token by token, where a program rounds activations or caches to integers.

    Libraries add the terms of a product in an order that depends on the number of rows. Results then differ in the
    last bit, which changes nothing, unless they are rounded to integers: a number close to a boundary gets another
    code, and after some layers logits differ in the second digit. So a program that rounds chooses another token in
    some of a thousand cases when it reads several at once.

    Before: a program with a cache, for one text. After: each product with a weight, and each attention, is called for
    one token at a time, as in a call with one token; keys and masks end at that token. All else works on each number or
    row by itself. Attention that is spelled out as products and softmax stays as it is.

    Does nothing to programs that do not round.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        if not any(node.target in _ROUNDING for node in graph.nodes):
            return PassResult(graph_module, False)
        infer_shapes(graph_module)
        ids, mask = [node for node in graph.nodes if node.op == "placeholder"][:2]
        new, total = ids.meta["val"].shape[1], mask.meta["val"].shape[1]
        changed = False
        for node in graph.nodes:
            if node.target in _PRODUCTS | _ATTENTION:
                rows = [_axis(argument, new) for argument in node.args]
                columns = [_axis(argument, total) for argument in node.args]
                if node.target in _PRODUCTS:
                    columns = [None] * len(rows)
                out = _axis(node, new)
                if rows[0] is not None and out is not None:
                    node.target = ByRow(node.target, rows, columns, out)
                    changed = True
        return PassResult(graph_module, changed)


class ByRow:
    """An operator, called for each new token.

    Args:
        operator: the operator.
        rows: for each argument, the axis of new tokens, None if it has none.
        columns: for each argument, the axis of all tokens.
        out: axis of the result.
    """

    def __init__(self, operator: Any, rows: Sequence[int | None], columns: Sequence[int | None], out: int) -> None:
        self.operator, self.rows, self.columns, self.out = operator, rows, columns, out
        self.__name__ = self.__qualname__ = f"{operator.overloadpacket.__name__}_by_row"
        self.__module__ = __name__

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        count = args[0].shape[self.rows[0]]
        if count == 1:
            return self.operator(*args, **kwargs)
        parts = []
        for row in range(count):
            given = list(args)
            for place, (axis, column) in enumerate(zip(self.rows, self.columns, strict=True)):
                if axis is not None:
                    given[place] = given[place].narrow(axis, row, 1)
                if column is not None:
                    given[place] = given[place].narrow(column, 0, given[place].shape[column] - count + row + 1)
            parts.append(self.operator(*given, **kwargs))
        return torch.cat(parts, self.out)


def _axis(node: Any, size: Any) -> int | None:
    """The axis of a node's tensor that has `size`."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    found = [
        axis for axis, length in enumerate(value.shape if isinstance(value, Tensor) else ())
        if isinstance(length, torch.SymInt) and length.node.expr == size.node.expr
    ]  # fmt: skip
    return found[0] if len(found) == 1 else None
