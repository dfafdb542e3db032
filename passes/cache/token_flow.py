"""Proves that no token of a causal language model reads another one outside attention.

Every tensor that is computed from tokens has one axis that holds them (`Place`). For every node, that place is found:

- operators that work on each number, or on each row of the last axis, leave tokens where they are;
- a view keeps the order of all numbers, so the distance from one token to the next stays the same; a view without an
  axis for that distance mixes tokens;
- every other operator is run on random tensors, for all tokens and for the last ones (module `probing`): either it
  gives the same rows, or it mixes tokens.

For a tensor without such an axis, the probe tells whether it belongs to the last token (`x[:, -1]`, `x[:, [-1]]`),
which a call with new tokens has as well, or to no token (`x.new_zeros(...)`).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from loopq_compile.errors import LoopQError
from loopq_compile.operators import ops
from loopq_compile.passes.cache.cache_regions import Regions, is_pointwise, shape_of, where
from loopq_compile.passes.cache.probing import Place, Probe, last_tokens, same

_aten = torch.ops.aten
_ALL, _SOME, _ONE = 7, 3, 1
"""Tokens of a probe, and how many of them later calls have."""
_NORMS = {_aten.rms_norm.default, _aten.layer_norm.default}
_ROWS = {
    *_NORMS,
    _aten.linear.default,
    ops.quantize.default,
    ops.dequantize.default,
    ops.dynamic_scale.default,
    ops.kronecker.default,
    ops.transition_adapter.default,
    ops.compensate.default,
}
"""Operators on the last axis (norms: the last few), which treat each row by itself."""
_VIEWS = {_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default, _aten.flatten.using_ints}
_VIEWS |= {_aten.unflatten.int, _aten.unsqueeze.default, _aten.squeeze.dim, _aten.squeeze.default}
_ALIKE = {
    *(
        getattr(_aten, name).default
        for name in ["clone", "contiguous", "alias", "detach", "dropout", "lift_fresh_copy"]
    ),
    *(_aten.to.dtype, _aten.to.device, _aten.to.dtype_layout, _aten.to.other, _aten._to_copy.default),
    *(_aten.type_as.default, _aten.zeros_like.default, _aten.ones_like.default, _aten.full_like.default),
}
"""Operators whose result has the shape of their first argument."""
Places = Place | None | list["Place | None"]


class TokenFlow:
    """Follows tokens through the token region of a graph.

    Args:
        regions: regions of the graph.
        attention: nodes of attention, which may mix tokens; its `results` hold one row for each token.

    `last` has the nodes that hold only the last token's share.
    """

    def __init__(self, regions: Regions, attention: set[fx.Node], results: set[fx.Node]) -> None:
        self.regions, self.attention, self.results = regions, attention, results
        self.probe = Probe(regions)
        self.places: dict[fx.Node, Places] = {regions.ids: Place(1)}
        self.last: set[fx.Node] = set()

    def check(self) -> None:
        """Runs the proof.

        Raises:
            LoopQError: a token reads another one; the message names the node, its loop and its source line.
        """
        for node in self.regions.graph_module.graph.nodes:
            if node not in self.regions.tokens or node.op != "call_function":
                continue
            if node in self.attention:
                self._check_attention(node)
                self.places[node] = Place(len(shape_of(node)) - 2) if node in self.results else None
                continue
            if any(argument in self.attention - self.results for argument in node.all_input_nodes):
                raise _refused(node, "reads the scores of an attention")
            if any(argument in self.last for argument in node.all_input_nodes):
                self._check_last(node)
                continue
            self.places[node] = self._place(node)

    def _check_attention(self, node: fx.Node) -> None:
        """Checks that queries, keys and values hold one token in each row."""
        for argument in node.all_input_nodes:
            place = self.places.get(argument)
            if argument in self.last or (isinstance(place, Place) and place.inner != 1):
                raise _refused(node, f"reads {argument.name!r}, which does not hold one token in each row")

    def _place(self, node: fx.Node) -> Places:
        if node.target is operator.getitem:
            found: Any = self.places[node.args[0]]  # type: ignore[index]
            return found[node.args[1]]
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and node.target not in _ALIKE:
            raise _refused(node, "is random")
        pairs = self._placed(node.all_input_nodes)
        has_sizes = any(argument in self.regions.sizes for argument in node.all_input_nodes)
        if node.target in _VIEWS and pairs:
            return self._view(node, *pairs[0])
        if node.target in _ALIKE and node.args and node.args[0] in self.places:
            return self.places[node.args[0]]  # type: ignore[index]
        if is_pointwise(node) and not has_sizes:
            return self._aligned(node, pairs)
        if node.target is _aten.embedding.default and pairs:
            return pairs[0][1]
        if node.target in _ROWS or _is_product_with_constant(node, pairs):
            shape = node.args[1] if node.target in _NORMS else [0]
            found = {place for _, place in pairs}
            rank = len(shape_of(node.args[0])) - len(shape)  # type: ignore[arg-type]
            if len(found) == 1 and pairs[0][0] is node.args[0] and pairs[0][1].axis < rank:
                return found.pop()
        return self._probed(node, pairs)

    def _placed(self, nodes: Iterable[fx.Node]) -> list[tuple[fx.Node, Place]]:
        """Those of `nodes` that run over the sequence, with their places."""
        found: list[tuple[fx.Node, Place]] = []
        for node in nodes:
            place = self.places.get(node)
            if isinstance(place, Place):
                found.append((node, place))
            elif node in self.regions.positions and len(self.regions.axes(node)) == 1:
                found.append((node, Place(self.regions.axes(node)[0])))
        return found

    def _aligned(self, node: fx.Node, pairs: Sequence[tuple[fx.Node, Place]]) -> Place | None:
        """The common place of broadcast tensors, which are aligned from the last axis."""
        seen = {(place.axis - len(shape_of(argument)), place.inner) for argument, place in pairs}
        if len(seen) > 1:
            raise _refused(node, "combines tokens with tokens at another place of the sequence")
        if not seen:
            return None
        axis, inner = seen.pop()
        return Place(axis + len(shape_of(node)), inner)

    def _view(self, node: fx.Node, source: fx.Node, place: Place) -> Place:
        distance = place.inner * _product(shape_of(source)[place.axis + 1 :])
        shape = shape_of(node)
        for axis, size in enumerate(shape):
            inner = sympy.cancel(distance / _product(shape[axis + 1 :]))
            outer = sympy.cancel(_product([size]) / (self.regions.symbol * inner))
            whole = all(sympy.fraction(number)[1] == 1 for number in (inner, outer))
            if whole and not {self.regions.symbol} & (inner.free_symbols | outer.free_symbols):
                return Place(axis, inner)
        raise _refused(node, f"turns {list(shape_of(source))} into {list(shape)}, which mixes tokens with channels")

    def _check_last(self, node: fx.Node) -> None:
        """Refuses a node that reads the last token's share together with something that runs over the sequence."""
        if node.target is not operator.getitem and self._placed(node.all_input_nodes):
            raise _refused(node, "combines the last token with those before it")
        self.last.add(node)

    def _probed(self, node: fx.Node, pairs: Sequence[tuple[fx.Node, Place]]) -> Places:
        try:
            return self._run(node, dict(pairs))
        except LoopQError:
            raise
        except Exception as error:  # an operator that cannot run on random tensors may be harmful
            raise _refused(node, "may mix tokens of the sequence") from error

    def _run(self, node: fx.Node, places: dict[fx.Node, Place]) -> Places:
        probe, inputs = self.probe, node.all_input_nodes
        if any(len(self.regions.axes(a)) > 1 for a in inputs if a in self.regions.positions):
            raise _refused(node, _reason(self.regions, node))

        def values(given: dict[fx.Node, Any], count: int) -> dict[fx.Node, Any]:
            found = {}
            for argument in inputs:
                if argument in self.regions.sizes or not isinstance(argument.meta.get("val"), Tensor):
                    found[argument] = probe.number(argument.meta["val"], count)
                elif argument in places:
                    place = places[argument]
                    inner = probe.number(place.inner, _ALL)
                    found[argument] = last_tokens(given[argument], place, inner, _ALL, count)
                else:
                    found[argument] = given[argument]
            return found

        tensors = [a for a in inputs if isinstance(a.meta.get("val"), Tensor)]
        given = {a: probe.random(a, _ALL) for a in tensors}
        other = {a: probe.random(a, _ALL) if a in places else given[a] for a in tensors}
        runs = [probe.run(node, values(given, count)) for count in (_ALL, _SOME, _ONE)]
        changed = probe.run(node, values(other, _ALL))
        if isinstance(runs[0], Tensor):
            return self._compare(node, runs, changed, list(places.values()))
        return [
            self._compare(node, parts[:-1], parts[-1], list(places.values()))
            for parts in zip(*runs, changed, strict=True)
        ]

    def _compare(self, node: fx.Node, runs: Sequence[Tensor], changed: Tensor, places: list[Place]) -> Place | None:
        whole, some, _ = runs
        if whole.ndim == some.ndim:
            varies = [axis for axis in range(whole.ndim) if whole.shape[axis] != some.shape[axis]]
            for place in [
                Place(axis, inner) for axis in varies[:1] for inner in {p.inner for p in places} | {sympy.S.One}
            ]:
                inner = self.probe.number(place.inner, _ALL)
                fits = len(varies) == 1 and whole.shape[place.axis] % (_ALL * inner) == 0
                if fits and all(
                    same(last_tokens(whole, place, inner, _ALL, count), run)
                    for count, run in zip((_SOME, _ONE), runs[1:], strict=True)
                ):
                    return place
            if not varies and all(same(whole, run) for run in runs[1:]):
                if not same(whole, changed):
                    self.last.add(node)
                return None
        raise _refused(node, _reason(self.regions, node))


def _is_product_with_constant(node: fx.Node, pairs: Sequence[tuple[fx.Node, Place]]) -> bool:
    return node.target is _aten.matmul.default and len(pairs) == 1 and len(shape_of(node.args[1])) == 2


def _product(sizes: Iterable[Any]) -> Any:
    total: Any = sympy.S.One
    for size in sizes:
        total = total * (size.node.expr if isinstance(size, torch.SymInt) else size)
    return total


def _reason(regions: Regions, node: fx.Node) -> str:
    """Why a node that failed its probe is refused."""
    tensors = [argument for argument in node.all_input_nodes if regions.axes(argument)]
    if node.target in (_aten.matmul.default, _aten.bmm.default, _aten.einsum.default) and len(tensors) > 1:
        return "multiplies two tensors that run over the sequence"
    twice = [argument for argument in tensors if len(regions.axes(argument)) > 1]
    if twice:
        return f"combines tokens with {twice[0].name!r}, which runs over the sequence twice"
    if any(argument in regions.sizes for argument in node.all_input_nodes) and is_pointwise(node):
        return "depends on the length of the text, so what is cached would change with every token"
    schema = getattr(node.target, "_schema", None)
    if any(argument.name in ("dim", "dims") for argument in (schema.arguments if schema else ())):
        return "works along the sequence"
    return "mixes tokens of the sequence"


def _refused(node: fx.Node, reason: str) -> LoopQError:
    return LoopQError(
        f"This model cannot have a key-value cache: {where(node)}. It {reason}, and is not an attention that is known "
        "here (scaled_dot_product_attention, or softmax(q k + mask) v). Use cache=False, or generate without a cache."
    )
