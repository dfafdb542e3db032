"""Compares the iterations of a loop node by node, and builds the one body that represents all of them.

In every iteration, a body node reads one of these:

- the node at the same place of its own iteration: a value inside the body;
- the node at the same place of the iteration before: state. The first iteration reads what the loop starts from. A
  transition adapter on this edge is the body's entry. If the first iteration has none, it gets a row of zeros, with
  which an adapter returns its input;
- the same value in all iterations: shared, an argument of the body;
- different constants: rows of a table. Rows of one stored table are read from it; different weights are stacked, a
  dequantized one as integers and scales; everything else is computed now;
- the number of the iteration, where an operator of `loopq::` reads rows itself: the row number;
- a row of an input for each iteration, `past[t]`: a key-value cache, of which the body gets its iteration's entry;
- different values that do not depend on the loop: stacked before it.

What an iteration computes only from its number (an embedding of its time) may be computed differently in each one, for
instance as a sum that begins with zero. If iterations match apart from that (`hoisted`), it stays before the loop:
constants become rows of a table, and what depends on sizes is stacked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from loopq_compile.errors import LoopQError
from loopq_compile.graph.constants import constant_nodes, evaluate, independent_nodes
from loopq_compile.graph.insert import call
from loopq_compile.graph.keys import TAG
from loopq_compile.graph.loops import get_tag
from loopq_compile.graph.state import get_tensor
from loopq_compile.operators import ops

_aten = torch.ops.aten
_ADAPTER = ops.transition_adapter.default
_GATE = 1
"""Position of the gate among an adapter's arguments; up to `_LAST_ROW` they are rows, then tensors that loops share."""
_LAST_ROW = 4


class Mismatch(LoopQError):
    """Two iterations differ in a way that data cannot express. `first` tells whether one of them is the first."""

    def __init__(self, message: str, first: bool = False) -> None:
        super().__init__(message)
        self.first = first


@dataclass
class Shared:
    """What the body gets in addition to its state: a `node` of the graph around it (`scanned`: its entry for the
    iteration), a new table of `values`, or a `stack` of nodes to be made before the loop."""

    name: str
    node: fx.Node | None = None
    values: Tensor | None = None
    stack: tuple[fx.Node, ...] = ()
    scanned: bool = False


@dataclass
class Match:
    """The body of a loop and how it is connected.

    Args:
        body: the graph `(row, *state, *shared) -> (*state, *collected)`; without an output node until `finish`.
        members: nodes of every iteration that the body replaces.
        initial: what the state starts from, by place and starting value.
        shared: shared values in order of the body's arguments.
        copies: body nodes by place.
    """

    body: fx.Graph
    members: list[list[fx.Node]]
    row: fx.Node
    initial: dict[tuple[int, fx.Node], fx.Node] = field(default_factory=dict)
    shared: list[tuple[Shared, fx.Node]] = field(default_factory=list)
    copies: list[fx.Node] = field(default_factory=list)
    adapters: list[fx.Node] = field(default_factory=list)


def match_iterations(graph_module: fx.GraphModule, number: int, skipped: int, hoisted: bool = False) -> Match:
    """Matches the iterations of top-level loop `number`, without the first `skipped`.

    The graph is not changed. `hoisted` excludes from the iterations what no input of the graph can change.

    Raises:
        LoopQError: the iterations differ; the message names the node and its loop.
    """
    return _Matcher(graph_module, number, skipped, hoisted).run()


class _Matcher:
    def __init__(self, graph_module: fx.GraphModule, number: int, skipped: int, hoisted: bool) -> None:
        self.graph_module, self.skipped = graph_module, skipped
        graph = graph_module.graph
        self.constant = independent_nodes(graph) if hoisted else constant_nodes(graph)
        outside = independent_nodes(graph, sizes=True) if hoisted else self.constant
        iterations: dict[int, list[fx.Node]] = {}
        for node in graph.nodes:
            tag = get_tag(node)
            if tag is not None and tag.loops[0] == number and node not in outside:
                iterations.setdefault(tag.index[0], []).append(node)
        chosen = [iterations[t] for t in sorted(iterations)][skipped:]
        adapters = [node for nodes in chosen for node in nodes if node.target is _ADAPTER]
        members = [[node for node in nodes if node.target is not _ADAPTER] for nodes in chosen]
        self.place = {node: (t, i) for t, nodes in enumerate(members) for i, node in enumerate(nodes)}
        self.depends = self._dependents(members)
        body = fx.Graph()
        self.match = Match(body, members, body.placeholder("row"), adapters=adapters)
        self.arguments: dict[Any, fx.Node] = {}
        self.reads: dict[Any, fx.Node] = {}

    def _dependents(self, members: list[list[fx.Node]]) -> set[fx.Node]:
        """The loop's nodes, and all that depend on one of them."""
        found = {node for nodes in members for node in nodes}
        for node in self.graph_module.graph.nodes:
            if any(argument in found for argument in node.all_input_nodes):
                found.add(node)
        return found

    def run(self) -> Match:
        members = self.match.members
        for t, nodes in enumerate(members[:-1]):
            for before, after in zip(nodes, members[-1], strict=False):
                if before.target is not after.target:
                    raise self._mismatch(t, before, f"{_call(before)} where loop {self._loop(-1)} has {_call(after)}")
            if len(nodes) != len(members[-1]):
                longer = max(nodes, members[-1], key=len)
                extra = longer[min(len(nodes), len(members[-1]))]
                where = self._loop(t) if longer is nodes else self._loop(-1)
                raise self._mismatch(t, extra, f"{_call(extra)}, which only loop {where} has")
        for same in zip(*members, strict=True):
            self.match.copies.append(self._copy(same))
        return self.match

    def _copy(self, nodes: Sequence[fx.Node]) -> fx.Node:
        flat, layouts = zip(*(pytree.tree_flatten((node.args, node.kwargs)) for node in nodes), strict=True)
        for t, layout in enumerate(layouts):
            if layout != layouts[-1]:
                raise self._mismatch(
                    t, nodes[t], f"{_call(nodes[t])} with other arguments than in loop {self._loop(-1)}"
                )
        leaves = [self._argument(nodes, values) for values in zip(*flat, strict=True)]
        args, kwargs = pytree.tree_unflatten(leaves, layouts[0])
        copy = self.match.body.create_node(nodes[0].op, nodes[0].target, args, kwargs, name=nodes[0].name)
        _copy_meta(copy, nodes[0])
        return copy

    def _argument(self, readers: Sequence[fx.Node], values: Sequence[Any]) -> Any:
        """The body's value for what `readers` have as one of their arguments."""
        first = values[0]
        if not any(isinstance(value, fx.Node) for value in values):
            if self._counts(readers, values):
                return self.match.row
            for t, value in enumerate(values):
                if type(value) is not type(first) or value != first:
                    raise self._mismatch(t, readers[t], f"{_call(readers[t])} with the number {value}, not {first}")
            return first
        if not all(isinstance(value, fx.Node) for value in values):
            raise self._mismatch(0, readers[0], f"{_call(readers[0])} with a number where other loops have a tensor")
        places = [self.place.get(value) for value in values]
        if all(place and place == (t, places[0][1]) for t, place in enumerate(places)):  # type: ignore[index]
            return self.match.copies[places[0][1]]  # type: ignore[index]
        if all(value in self.constant for value in values):
            return self._constant(values)
        if all(value is first for value in values) and first not in self.depends:
            return self._shared(first, Shared(first.name, node=first))
        if self._is_scanned(values):
            return self._shared(("scanned", first), Shared(first.args[0].name, node=first.args[0], scanned=True))
        if len(values) > 1 and not any(value in self.depends or _is_size(value) for value in values):
            return self._row(("stack", *values), Shared(f"{first.name}_rows", stack=tuple(values)))
        return self._state(readers, values)

    def _counts(self, readers: Sequence[fx.Node], values: Sequence[Any]) -> bool:
        """Whether a fused operator is given the number of the iteration, by which it reads its tables."""
        own = getattr(readers[0].target, "namespace", "") == "loopq" and len(values) > 1
        return own and list(values) == list(range(self.skipped, self.skipped + len(values)))

    def _is_scanned(self, values: Sequence[fx.Node]) -> bool:
        """Whether iteration `t` reads entry `t` of an input."""
        table = values[0].args[0] if values[0].target is _aten.select.int else None
        if not isinstance(table, fx.Node) or table.op != "placeholder" or self.skipped:
            return False
        return all(v.target is _aten.select.int and v.args == (table, 0, t) for t, v in enumerate(values))

    def _state(self, readers: Sequence[fx.Node], values: Sequence[fx.Node]) -> fx.Node:
        adapted = [value in self.match.adapters for value in values]
        sources: list[Any] = [value.args[0] if entry else value for value, entry in zip(values, adapted, strict=True)]
        place = self.place.get(sources[-1], (0, 0))[1]
        for t, source in enumerate(sources):
            # The first iteration's state comes from before the loop, every other one's from the iteration before.
            if self.place.get(source) != (t - 1, place) if t else source in self.depends:
                raise self._mismatch(
                    t,
                    readers[t],
                    f"{_call(readers[t])} on {values[t].name!r}, which is neither of its own loop nor, as in the "
                    "other loops, the state that the loop before it left",
                )
        if len(values) == 1 or any(adapted[1:]) != all(adapted[1:]):
            raise self._mismatch(0, readers[0], f"{_call(readers[0])} with a transition adapter in some loops only")
        key = (place, sources[0])
        if key not in self.match.initial:
            with self.match.body.inserting_before(self._first_argument()):
                self.match.initial[key] = self.match.body.placeholder(f"state_{len(self.match.initial)}")
        return self._adapter(key, values, adapted[0]) if any(adapted) else self.match.initial[key]

    def _first_argument(self) -> fx.Node:
        """Where the state's placeholders end: at the first shared one or, if there is none, the first node of the
        body."""
        known = {self.match.row, *self.match.initial.values()}
        return next((node for node in self.match.body.nodes if node not in known), self.match.body._root)

    def _adapter(self, key: tuple[int, Any], values: Sequence[fx.Node], in_first: bool) -> fx.Node:
        entry = ("adapter", *key)
        if entry not in self.reads:
            nodes = values if in_first else values[1:]
            arguments: list[fx.Node] = []
            for position in range(_GATE, len(nodes[0].args)):
                parts: list[Any] = [node.args[position] for node in nodes]
                if position > _LAST_ROW:
                    arguments.append(self._constant(parts))
                    continue
                rows = torch.stack([value for _, value in self._values(parts)])
                if not in_first:
                    rows = torch.cat([torch.zeros_like(rows[:1]), rows])
                name = f"{_table_name(parts[0])}_entry"
                arguments.append(self._row(("entry", *key, position), Shared(name, values=rows)))
            adapter = call(self.match.body, _ADAPTER, self.match.initial[key], *arguments)
            _copy_meta(adapter, nodes[0])
            self.reads[entry] = adapter
        return self.reads[entry]

    def _constant(self, values: Sequence[fx.Node]) -> fx.Node:
        first = values[0]
        if all(value is first for value in values):
            return self._shared(first, Shared(first.name, node=first))
        if all(_table_of(value) is not None and _table_of(value) is _table_of(first) for value in values):
            table: Any = _table_of(first)
            rows: list[Any] = [value.args[2] for value in values]
            stored = get_tensor(self.graph_module, str(table.target))
            if len(set(rows)) == 1:
                return self._shared((table, rows[0]), Shared(first.name, node=first))
            if rows == list(range(len(stored))):
                return self._row(table, Shared(table.name, node=table), first)
            name = f"{table.target}_rows_{'_'.join(map(str, rows))}"
            return self._row((table, *rows), Shared(name, values=stored.detach()[rows]), first)
        if all(value.target is ops.dequantize.default for value in values):
            codes, scales, sizes = zip(*(value.args for value in values), strict=True)
            if len(set(sizes)) == 1:
                key = ("dequantize", *values)
                if key not in self.reads:
                    parts = self._constant(codes), self._constant(scales)  # type: ignore[arg-type]
                    self.reads[key] = call(self.match.body, ops.dequantize.default, *parts, sizes[0])
                    _copy_meta(self.reads[key], first)
                return self.reads[key]
        computed = dict(self._values(values))
        tensors = [computed[value] for value in values]
        for t, tensor in enumerate(tensors):
            if tensor.shape != tensors[0].shape or tensor.dtype != tensors[0].dtype:
                raise self._mismatch(t, values[t], f"a constant {list(tensor.shape)}, not {list(tensors[0].shape)}")
        if all(tensor.equal(tensors[0]) for tensor in tensors):
            return self._shared(first, Shared(first.name, node=first))
        name = f"{first.target if first.op == 'get_attr' else first.name}_loops"
        return self._row(("values", *values), Shared(name, values=torch.stack(tensors)), first)

    def _values(self, nodes: Sequence[fx.Node]) -> list[tuple[fx.Node, Tensor]]:
        computed = dict(evaluate(self.graph_module, nodes))
        return [(node, computed[node]) for node in nodes]

    def _shared(self, key: Any, shared: Shared) -> fx.Node:
        if key not in self.arguments:
            spot = next((n for n in self.match.body.nodes if n.op != "placeholder"), self.match.body._root)
            with self.match.body.inserting_before(spot):
                self.arguments[key] = self.match.body.placeholder(shared.name.replace(".", "_"))
            self.match.shared.append((shared, self.arguments[key]))
        return self.arguments[key]

    def _row(self, key: Any, shared: Shared, origin: fx.Node | None = None) -> fx.Node:
        """The row of a table that belongs to the iteration."""
        table = self._shared(key, shared)
        if ("row", key) not in self.reads:
            read = self.reads["row", key] = call(self.match.body, _aten.select.int, table, 0, self.match.row)
            if origin is not None:
                _copy_meta(read, origin)
        return self.reads["row", key]

    def _loop(self, t: int) -> int:
        return self.skipped + t % len(self.match.members)

    def _mismatch(self, t: int, node: fx.Node, what: str) -> Mismatch:
        return Mismatch(
            f"roll-loops: loop {self._loop(t)} is not like the others: node {node.name!r} is {what}. A loop can be "
            "rolled where all iterations do the same on other data; use form='unrolled'.",
            first=t == 0,
        )


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), int | float | torch.SymInt | torch.SymFloat | torch.SymBool)


def _table_of(node: fx.Node) -> fx.Node | None:
    table = node.args[0] if node.target is _aten.select.int and node.args[1] == 0 else None
    return table if isinstance(table, fx.Node) and table.op == "get_attr" else None


def _table_name(node: fx.Node) -> str:
    table = _table_of(node)
    return str(table.target) if table is not None else node.name


def _copy_meta(copy: fx.Node, node: fx.Node) -> None:
    """Copies the metadata that holds in every loop: all but the tag and the types seen in one loop."""
    copy.meta.update({k: v for k, v in node.meta.items() if k not in ("val", TAG, "custom")})


def _call(node: fx.Node) -> str:
    return f"a call of {node.target}"
