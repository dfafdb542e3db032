"""Absolute positions in a graph with a key-value cache: a token's number counts real tokens, not padding.

A program counts `0, 1, 2, ...` from the first column. In a row with padding on the left, the first real token is
further right. What is added to its state, multiplied or joined with it, must therefore be that of an earlier column.
It does not matter how that value was made: rows of a stored table, sinusoids, or a linear of either.

Rotary tables are not changed: only distances matter there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from loopq_compile.errors import LoopQError
from loopq_compile.passes.cache.attention import Attention
from loopq_compile.passes.cache.cache_regions import Regions, is_pointwise, shape_of, where
from loopq_compile.passes.cache.last_rows import LastRows

_aten = torch.ops.aten
_LENGTHS = (5, 7)
_LARGEST_TURN = 4.0
"""Largest value in rotary tables, which hold cosines and sines, perhaps scaled a little."""
_JOINS = {_aten.add.Tensor, _aten.sub.Tensor, _aten.rsub.Tensor, _aten.cat.default, _aten.stack.default}
Meeting = tuple[fx.Node, fx.Node]


def find_absolute(regions: Regions, attention: list[Attention], meetings: list[Meeting]) -> set[Meeting]:
    """Those `meetings` (tokens outside attention combined with positions along one axis) that tell a token's position.

    What a model computes from its attention mask is not among them.

    Raises:
        LoopQError: a value computed from positions depends on the length of the text.
    """
    masked = _computed_from_mask(regions)
    inside = {node for found in attention for node in (found.node, *found.inside)}
    values = {found.value for found in attention}
    absolute = set()
    for node, argument in meetings:
        if node in inside or len(regions.axes(argument)) != 1 or argument in masked:
            continue
        turns = _turns(regions, argument)
        if not turns or node.target in _JOINS or not _reaches_scores_only(node, inside, values):
            absolute.add((node, argument))
    return absolute


class RealTokens:
    """Rows of positions, chosen by each token's number among the tokens that are not padding.

    Args:
        rows: takes the new tokens' share of positions; tells how many there are.
        padding: the attention mask `[batch, total]`.
    """

    def __init__(self, rows: LastRows, padding: fx.Node) -> None:
        self.regions, self.new = rows.regions, rows.new
        graph = padding.graph
        with graph.inserting_before(rows.total.next):
            call: Any = graph.call_function
            counted = call(_aten.sub.Tensor, (call(_aten.cumsum.default, (padding, 1)), 1))
            numbers = call(_aten.slice.Tensor, (call(_aten.clamp_min.default, (counted, 0)), 1, rows.past, rows.total))
            flat = call(_aten.reshape.default, (numbers, [-1]))
            count = call(_aten.sym_size.int, (flat, 0))
        self.rows = NumberedRows(rows, flat, count)
        self.made: dict[tuple[fx.Node, int], fx.Node] = {}

    def take(self, node: fx.Node, argument: fx.Node) -> fx.Node:
        """`argument`, which `node` reads, for the new tokens of every row of the batch.

        Raises:
            LoopQError: it is not clear which axis is that of the batch.
        """
        back = self._batch_axis(node, argument)
        if (argument, back) not in self.made:
            self.made[argument, back] = self._rows_of(argument, back)
        return self.made[argument, back]

    def _batch_axis(self, node: fx.Node, argument: fx.Node) -> int:
        """The axis of the batch, counted from the last, in `argument` or in what it is broadcast with."""
        batch, axis = shape_of(self.regions.ids)[0], self.regions.axes(argument)[0] - len(shape_of(argument))
        own = [a - len(shape_of(argument)) for a, size in enumerate(shape_of(argument)) if _equal(size, batch)]
        found = own
        if not own and (is_pointwise(node) or (node.target is _aten.matmul.default and axis < -2)):
            shape = shape_of(node)
            found = [a - len(shape) for a, size in enumerate(shape) if _equal(size, batch)]
            sizes = [shape_of(argument)[a] for a in found if -a <= len(shape_of(argument))]
            found = [] if any(size != 1 for size in sizes) else found
        if len(found) != 1:
            raise LoopQError(
                f"This model cannot have a key-value cache: {where(node)} combines tokens with {argument.name!r}, "
                "which tells their positions, and it is not known how to leave out padding there. Use cache=False."
            )
        return found[0]

    def _rows_of(self, argument: fx.Node, back: int) -> fx.Node:
        """`argument [..., total, ...]` as `[..., batch, ..., new, ...]`, the batch on axis `back`."""
        made, shape = self.rows.take(argument, self.regions.axes(argument)[0]), list(shape_of(argument))
        axis = self.regions.axes(argument)[0] - len(shape)
        if -back <= len(shape):
            made = self.rows.create(made, _aten.select.int, (made, back, 0))
            del shape[back]
            axis += 1 if axis < back else 0
        token = len(shape) + axis
        sizes = [*shape[:token], -1, self.new, *shape[token + 1 :]]
        made = self.rows.create(made, _aten.reshape.default, (made, sizes))
        for _ in range(-back - len(sizes)):
            made, token = self.rows.create(made, _aten.unsqueeze.default, (made, 0)), token + 1
        rank = max(len(sizes), -back)
        order = [other for other in range(rank) if other != token]
        order.insert(rank + back, token)
        if order == sorted(order):
            return made
        return self.rows.create(made, _aten.permute.default, (made, order))


class NumberedRows(LastRows):
    """Takes rows `numbers [rows]` along one axis of a node of the region of positions."""

    def __init__(self, rows: LastRows, numbers: fx.Node, count: fx.Node) -> None:
        super().__init__(rows.regions, rows.past, count, rows.total)
        self.numbers = numbers

    def _count(self, node: fx.Node) -> fx.Node:
        dtype = node.meta["val"].dtype
        return self.numbers if dtype == torch.int64 else self.create(node, _aten.to.dtype, (self.numbers, dtype))

    def _slice(self, node: fx.Node, axis: int) -> fx.Node:
        return self.create(node, _aten.index_select.default, (node, axis, self.numbers))


def _computed_from_mask(regions: Regions) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for node in regions.graph_module.graph.nodes:
        if any(argument is regions.mask or argument in found for argument in node.all_input_nodes):
            found.add(node)
    return found


def _turns(regions: Regions, argument: fx.Node) -> bool:
    """Whether `argument` holds cosines and sines (or complex numbers) of angles that grow evenly from row to row.

    For every such column `v` there is a `c` of at most 2 with `v[p - 1] + v[p + 1] = c v[p]`.

    Raises:
        LoopQError: rows depend on the length of the text.
    """
    axis = regions.axes(argument)[0]
    short, table = (regions.compute([argument], n)[argument].movedim(axis, 0) for n in _LENGTHS)
    if not torch.equal(table[: len(short)], short):
        raise LoopQError(
            f"This model cannot have a key-value cache: {where(argument)} depends on the length of the text, so what "
            "is cached would change with every token. Use cache=False."
        )
    if not (table.is_floating_point() or table.is_complex()) or not table.abs().max() <= _LARGEST_TURN:
        return False
    exact = torch.view_as_real(table) if table.is_complex() else table
    tolerance = 4 * torch.finfo(exact.dtype).eps + 4e-6
    v = exact.double()
    around, middle = v[2:] + v[:-2], v[1:-1]
    c = (around * middle).sum(0) / middle.square().sum(0).clamp_min(1e-30)
    return bool((c.abs() <= 2 + tolerance).all() and ((around - c * middle).abs() <= tolerance).all())


def _reaches_scores_only(node: fx.Node, inside: set[fx.Node], values: set[tuple[fx.Node, int]]) -> bool:
    """Whether everything computed from `node` enters attention, as queries or keys."""
    seen, stack = {node}, [node]
    while stack:
        source = stack.pop()
        for user in source.users:
            if user in inside:
                if any(reader is user and user.args[position] is source for reader, position in values):
                    return False
            elif user.op == "output":
                return False
            elif user not in seen:
                seen.add(user)
                stack.append(user)
    return True


def _equal(size: Any, other: Any) -> bool:
    expressions = [getattr(getattr(x, "node", None), "expr", None) for x in (size, other)]
    return expressions[0] is not None and expressions[0] == expressions[1]
