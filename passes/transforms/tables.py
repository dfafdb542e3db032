"""Transforms before quantized linears: helpers to insert and to read them.

A group of linears that read `x` may read `(x * d) P` instead, `P = left (x) right`, if their weights become
`(W / d) P^-T` (LoopQ eq. 2, with weights stored `[outputs, inputs]`). Diagonal and factors are rows of tables
`transform.<group>.{diagonal,left,right}`, one row for all loops or one for each; their nodes carry the group's name.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, fx

from loopq_compile.graph.insert import add_constant, attribute_name, call, inserting
from loopq_compile.graph.keys import LEARN, SITE, TRANSFORM
from loopq_compile.graph.loops import LoopTag, get_tag
from loopq_compile.graph.state import get_state, get_tensor
from loopq_compile.graph.weights import site_calls, weight_chain
from loopq_compile.operators import ops
from loopq_compile.operators.precision import wide_type

_aten = torch.ops.aten

Inverses = dict[int, tuple[fx.Node, ...]]
"""By row, the nodes of a transform's inverse."""


@dataclass(frozen=True)
class Use:
    """One use of a group: the tensor it reads, its loop, and the linears in graph order."""

    x: fx.Node
    tag: LoopTag | None
    linears: list[fx.Node]


def group_uses(graph_module: fx.GraphModule) -> dict[str, list[Use]]:
    """The uses of every transform-weight group, in graph order."""
    order = {node: i for i, node in enumerate(graph_module.graph.nodes)}
    found: dict[str, dict[tuple[fx.Node, LoopTag | None], list[fx.Node]]] = defaultdict(dict)
    for site, linears in site_calls(graph_module):
        for linear in linears:
            found[site.group].setdefault((linear.args[0], get_tag(linear)), []).append(linear)  # type: ignore[arg-type]
    return {
        group: [Use(x, tag, sorted(linears, key=order.__getitem__)) for (x, tag), linears in uses.items()]
        for group, uses in found.items()
    }


def group_tables(graph_module: fx.GraphModule) -> dict[str, dict[str, fx.Node]]:
    """The tables of every transform by part: `{group: {"diagonal" | "left" | "right": node}}`."""
    tables: dict[str, dict[str, fx.Node]] = defaultdict(dict)
    for node in reversed(graph_module.graph.nodes):  # new tables go to the top, so those of the first group come last
        if TRANSFORM in node.meta:
            tables[node.meta[TRANSFORM]][str(node.target).rpartition(".")[2]] = node
    return dict(tables)


def add_table(graph_module: fx.GraphModule, group: str, part: str, values: Tensor, learn: str | None) -> fx.Node:
    """Registers a table `[rows, ...]` of the transform of `group`; `learn` is how calibration may change it."""
    table = add_constant(graph_module, f"transform.{attribute_name(group)}.{part}", values.contiguous())
    table.meta[TRANSFORM] = group
    if learn:
        table.meta[LEARN] = learn
    return table


def insert_diagonal(graph_module: fx.GraphModule, group: str, uses: list[Use], table: fx.Node) -> None:
    """Multiplies the inputs of `group` in its `uses` by rows of `table [rows, d]`, and divides the weights by them."""
    graph = graph_module.graph
    dtype = _weight(graph_module, uses).dtype

    def row(number: int) -> fx.Node:
        chosen = call(graph, _aten.select.int, table, 0, number)
        half = torch.finfo(dtype).bits < 32  # a product with a wider table would not be in half precision
        return call(graph, _aten.to.dtype, chosen, dtype) if half else chosen

    def apply(x: fx.Node, number: int) -> fx.Node:
        return call(graph, _aten.mul.Tensor, x, row(number))

    def inverse(number: int) -> tuple[fx.Node, ...]:
        return (call(graph, _aten.reciprocal.default, row(number)),)

    _insert(graph_module, group, uses, [table], apply, inverse, _aten.mul.Tensor, {})


def insert_kronecker(
    graph_module: fx.GraphModule,
    group: str,
    uses: list[Use],
    left: fx.Node,
    right: fx.Node,
    inverses: Inverses | None = None,
) -> None:
    """Transforms the inputs of `group` in its `uses` by rows of Kronecker factor tables, and weights by the inverse.

    Groups that share the tables should share `inverses`, which starts as an empty dict.
    """
    graph = graph_module.graph

    def rows(number: int) -> list[fx.Node]:
        return [call(graph, _aten.select.int, table, 0, number) for table in (left, right)]

    def apply(x: fx.Node, number: int) -> fx.Node:
        return call(graph, ops.kronecker.default, x, *rows(number))

    def inverse(number: int) -> tuple[fx.Node, ...]:
        matrices = [call(graph, _aten.linalg_inv.default, row) for row in rows(number)]
        return tuple(call(graph, _aten.t.default, matrix) for matrix in matrices)

    made = {} if inverses is None else inverses
    _insert(graph_module, group, uses, [left, right], apply, inverse, ops.kronecker.default, made)


def _insert(
    graph_module: fx.GraphModule,
    group: str,
    uses: list[Use],
    tables: list[fx.Node],
    apply: Callable[[fx.Node, int], fx.Node],
    inverse: Callable[[int], tuple[fx.Node, ...]],
    operator: object,
    inverses: Inverses,
) -> None:
    """Puts `apply` before each use, and `operator(weight, *inverse)` after each weight, once per row of the tables."""
    graph, loops = graph_module.graph, get_state(graph_module).loops
    rows = get_tensor(graph_module, str(tables[0].target)).shape[0]
    standing = (node for node in graph.nodes if node in tables)  # tables are at the top, so reading stops early
    *_, last = islice(standing, len(tables))
    behind: dict[tuple[fx.Node, int], fx.Node] = {}
    for use in uses:
        x = use.linears[0].args[0]  # not `use.x`: the group may have a diagonal by now
        assert isinstance(x, fx.Node)
        number = loops.row(use.tag) if rows > 1 else 0
        with inserting(graph, before=use.linears[0], tag=use.tag, site=group):
            transformed = apply(x, number)
        if number not in inverses:
            with inserting(graph, before=last.next, tag=None, site=group):
                inverses[number] = inverse(number)
        for linear in use.linears:
            end = weight_chain(linear)[-1]
            if (end, number) not in behind:
                with inserting(graph, before=end.next, tag=None, site=linear.meta[SITE]):
                    behind[end, number] = call(graph, operator, end, *inverses[number])
            linear.update_arg(0, transformed)
            linear.update_arg(1, behind[end, number])


def group_width(graph_module: fx.GraphModule, uses: list[Use]) -> int:
    """Number of features that a group reads."""
    return _weight(graph_module, uses).shape[1]


def weight_type(graph_module: fx.GraphModule, uses: list[Use]) -> torch.dtype:
    """The type of a group's weights, in which the linears compute."""
    return _weight(graph_module, uses).dtype


def table_type(graph_module: fx.GraphModule, uses: list[Use]) -> torch.dtype:
    """The type of a group's tables: single precision at least."""
    return wide_type(_weight(graph_module, uses).dtype)


def _weight(graph_module: fx.GraphModule, uses: list[Use]) -> Tensor:
    return get_tensor(graph_module, str(weight_chain(uses[0].linears[0])[0].target))


def reads_stream(use: Use) -> bool:
    """Whether a group reads the residual stream (through a norm), not the output of other linears of its layer.

    The stream leads back to an embedding, or to an input of numbers, without going through a quantized linear.
    """
    stack, seen = [use.x], set[fx.Node]()
    while stack:
        node = stack.pop()
        if node in seen or (node.target is _aten.linear.default and SITE in node.meta):
            continue
        seen.add(node)
        value = node.meta.get("val")
        numbers = isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 2
        if (node.op == "placeholder" and numbers) or node.target is _aten.embedding.default:
            return True
        stack.extend(node.all_input_nodes)
    return False
