"""Where a program with a key-value cache can be cut in two: after the first K iterations of its main loop.

Every node is in one of two parts. *Late* is an iteration from number K on, and all that depends on one; the rest is
*early*. Late nodes read from early ones

- what holds new tokens (the state of the loop, an embedding that every iteration adds again): it is handed over as
  tensors of the new tokens, one axis of which counts them;
- what depends only on positions, sizes and stored tensors (masks, rotary tables): each part computes it by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from loopq_compile.errors import LoopQError
from loopq_compile.graph.caches import PAST_PREFIX, PRESENT_PREFIX, STATE_PREFIX, has_cache
from loopq_compile.graph.constants import constant_nodes
from loopq_compile.graph.early_exit import has_early_exit
from loopq_compile.graph.evaluate import sources_of
from loopq_compile.graph.loops import get_tag
from loopq_compile.graph.shapes import infer_shapes
from loopq_compile.graph.signature import LOOPS_AXIS, PAST, InputSpec, Signature, result_names
from loopq_compile.graph.state import get_state
from loopq_compile.operators import ops

_size = torch.ops.aten.sym_size.int


@dataclass(frozen=True)
class Carried:
    """A tensor that the first part hands to the second: its node, and the axis that counts new tokens."""

    node: fx.Node
    axis: int
    spec: InputSpec


class LoopCut:
    """The two parts of a graph with a cache; nothing is changed.

    Args:
        graph_module: an unrolled program with a cache for every iteration (pass `add-cache`).
        first: K, iterations of the main loop in the first part.

    Raises:
        LoopQError: the program has no loop, no cache, fewer iterations, or its parts share more than `Carried`.
    """

    def __init__(self, graph_module: fx.GraphModule, first: int) -> None:
        state = get_state(graph_module)
        _check(state.signature, state.loops.count, first, any(n.op == "call_module" for n in graph_module.graph.nodes))
        infer_shapes(graph_module)
        self.graph_module, self.first, self.signature = graph_module, first, state.signature
        nodes = list(graph_module.graph.nodes)
        inputs = [node for node in nodes if node.op == "placeholder"]
        self.ids, self.mask, *caches = inputs
        self.caches = dict(zip(caches, (spec.name for spec in self.signature.inputs[2:]), strict=True))
        output = nodes[-1]
        self.results: dict[str, Any] = dict(zip(result_names(self.signature.outputs), output.args[0], strict=True))
        self.late = self._late(nodes)
        if not isinstance(self.results.get("logits"), fx.Node) or self.results["logits"] not in self.late:
            raise LoopQError("Loops can propose tokens if the program returns logits that depend on its loop.")
        self.tokens = self._of_tokens(nodes)
        self.coda = self._coda()
        self.carried = self._carried(nodes)

    def _iteration(self, node: fx.Node) -> int | None:
        """Number of the main loop's iteration in which `node` is."""
        tag = get_tag(node)
        return tag.index[0] if tag is not None and tag.loops[0] == 0 else None

    def _late(self, nodes: Sequence[fx.Node]) -> set[fx.Node]:
        late = set[fx.Node]()
        for node in nodes:
            iteration = self._iteration(node)
            if node.op == "output":
                continue
            if (iteration is not None and iteration >= self.first) or any(a in late for a in node.all_input_nodes):
                late.add(node)
        return late

    def _of_tokens(self, nodes: Sequence[fx.Node]) -> set[fx.Node]:
        """Nodes whose values depend on token ids or on caches, sizes apart."""
        found = {self.ids, *self.caches}
        for node in nodes:
            if node.target is not _size and any(argument in found for argument in node.all_input_nodes):
                found.add(node)
        return found

    def _coda(self) -> set[fx.Node]:
        """Late nodes between the main loop and the logits."""
        found, stack = set[fx.Node](), [self.results["logits"]]
        while stack:
            node = stack.pop()
            if node in self.late and node not in found and self._iteration(node) is None:
                found.add(node)
                stack.extend(node.all_input_nodes)
        return found

    def _carried(self, nodes: Sequence[fx.Node]) -> list[Carried]:
        wanted = {self.results["logits"], *self.presents(self.late).values()}
        needed = sources_of(wanted) & self.late
        read = {a for node in needed for a in node.all_input_nodes if a not in self.late and a in self.tokens}
        states = [node for node in nodes if node in read and node is not self.ids and node not in self.caches]
        return [self._spec(node, number) for number, node in enumerate(states)]

    def _spec(self, node: fx.Node, number: int) -> Carried:
        """How `node` is handed over.

        Raises:
            LoopQError: its new tokens are not one axis.
        """
        batch, new = self.ids.meta["val"].shape
        value = node.meta.get("val")
        shape: list[int | str] = []
        for size in value.shape if isinstance(value, Tensor) else ():
            known = {_text(batch): "batch", _text(new): "sequence"}
            shape.append(size if isinstance(size, int) else known.get(_text(size), ""))
        if shape.count("sequence") != 1 or "" in shape:
            loop = f"{self.first} loops" if self.first > 1 else "the first loop"
            raise LoopQError(
                f"The program cannot be cut after {loop}: later ones read {node.name!r} ({node.target}), which is not "
                "a tensor of the new tokens, such as keys that loops share. Use speculate='lookup'."
            )
        assert isinstance(value, Tensor)
        return Carried(node, shape.index("sequence"), InputSpec(f"{STATE_PREFIX}{number}", value.dtype, tuple(shape)))

    def counterpart(self, node: fx.Node) -> fx.Node:
        """The node of the last early iteration that does what `node` does in a late one.

        Raises:
            LoopQError: the two iterations differ there.
        """
        iteration = self._iteration(node)
        assert iteration is not None
        there, here = self._members(iteration), self._members(self.first - 1)
        for step in (-1, 1):  # the ends of iterations are alike, where the first one begins in another way
            for theirs, ours in zip(there[::step], here[::step], strict=False):
                if _kind(theirs) != _kind(ours):
                    break
                if theirs is node:
                    return ours
        raise LoopQError(
            f"Loop {self.first - 1} has nothing like {node.name!r} ({node.target}) of loop {iteration}, from which the "
            "logits are computed, so the head cannot follow it. Choose another number of loops, or speculate='lookup'."
        )

    def _members(self, iteration: int) -> list[fx.Node]:
        constant = constant_nodes(self.graph_module.graph)
        return [
            node for node in self.graph_module.graph.nodes
            if self._iteration(node) == iteration and node not in constant
            and node.target is not ops.transition_adapter.default
        ]  # fmt: skip

    def presents(self, wanted: set[fx.Node]) -> dict[str, fx.Node]:
        """Results that are caches for the next call and among the nodes `wanted`."""
        return {k: node for k, node in self.results.items() if k.startswith(PRESENT_PREFIX) and node in wanted}

    def close(self, results: dict[str, fx.Node], states: Iterable[InputSpec] = ()) -> None:
        """Lets the graph return `results` only, and removes what these do not need, inputs included.

        Raises:
            LoopQError: no cache is left to count the past tokens.
        """
        graph, state = self.graph_module.graph, get_state(self.graph_module)
        output = next(node for node in graph.nodes if node.op == "output")
        output.args = (tuple(results.values()),)
        self._free_sizes(set(results))
        graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        for node in [node for node in self.caches if not node.users]:
            graph.erase_node(node)
            del self.caches[node]
        given = {PRESENT_PREFIX + name.removeprefix(PAST_PREFIX) for name in self.caches.values()}
        if given != {name for name in results if name.startswith(PRESENT_PREFIX)}:
            raise LoopQError(
                f"The program cannot be cut after {self.first} loops: the parts share keys and values. Choose another "
                "number of loops, or speculate='lookup'."
            )
        kept = {*self.caches.values()}
        specs = [spec for spec in self.signature.inputs if not spec.name.startswith(PAST_PREFIX) or spec.name in kept]
        inputs = (*specs[:2], *states, *specs[2:])
        state.signature = replace(
            state.signature,
            parameters=tuple(spec.name for spec in inputs),
            inputs=inputs,
            constants={},
            outputs=pytree.tree_structure(dict.fromkeys(results, 0)),
        )
        for node in graph.nodes:
            node.meta.pop("val", None)
        infer_shapes(self.graph_module)

    def _free_sizes(self, results: set[str]) -> None:
        """Lets sizes be read from inputs that this part has: of new tokens from ids, of past ones from a cache."""
        kept = {PAST_PREFIX + name.removeprefix(PRESENT_PREFIX) for name in results}
        past = [(node, spec.shape.index(PAST)) for node, spec in self._cache_specs() if spec.name in kept]
        if not past:
            raise LoopQError(
                f"The program cannot be cut after {self.first} loops: one of the parts has no attention, and no cache."
            )
        known = [(self.ids, 0), (self.ids, 1), (self.mask, 1), *past]
        sizes = {_text(node.meta["val"].shape[axis]): (node, axis) for node, axis in reversed(known)}
        for node in self.graph_module.graph.nodes:
            if node.target is _size and _text(node.meta["val"]) in sizes:
                node.args = sizes[_text(node.meta["val"])]

    def _cache_specs(self) -> list[tuple[fx.Node, InputSpec]]:
        specs = {spec.name: spec for spec in self.signature.inputs}
        return [(node, specs[name]) for node, name in self.caches.items()]


def _text(size: Any) -> str:
    return str(size.node.expr) if isinstance(size, torch.SymInt) else str(size)


def _kind(node: fx.Node) -> tuple[Any, ...]:
    tag = get_tag(node)
    return node.op, node.target, tag.index[1:] if tag else ()


def _check(signature: Signature, count: int, first: int, rolled: bool) -> None:
    """Refuses programs that have no two parts, with the reason."""
    if has_early_exit(signature):
        raise LoopQError("A program with early exit is not cut: its number of loops is not known beforehand.")
    if not has_cache(signature):
        raise LoopQError("Loops propose tokens in a program with a key-value cache; make one by program.with_cache().")
    if rolled or any(LOOPS_AXIS in spec.shape for spec in signature.inputs):
        raise LoopQError("Loops cannot be cut where their caches are stacked: use with_cache(stacked=False).")
    if count < 2:
        raise LoopQError("The model has no loop, so no first loops that could propose tokens. Use speculate='lookup'.")
    if not 1 <= first < count:
        raise LoopQError(f"{first} of {count} loops cannot propose tokens; choose 1 to {count - 1}.")
