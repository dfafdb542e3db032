"""`add-cache`: a call brings new tokens alone, with the keys and values of those before."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from loopq_compile.decoding import PAST_PREFIX, PRESENT_PREFIX, has_cache
from loopq_compile.errors import LoopQError
from loopq_compile.loops import get_tag, set_tag
from loopq_compile.passes.attention import Attention, find_attention, find_stem
from loopq_compile.passes.base import Pass, PassResult
from loopq_compile.passes.cache_masks import Masks
from loopq_compile.passes.cache_regions import (
    ATTENTION_MASK,
    Regions,
    check_tokens,
    find_regions,
    is_pointwise,
    shape_of,
    where,
)
from loopq_compile.passes.cache_store import CacheStore, cache_shape
from loopq_compile.passes.insert import inserting
from loopq_compile.passes.last_rows import LastRows
from loopq_compile.passes.learned_positions import find_tables, read_by_token
from loopq_compile.shapes import infer_shapes
from loopq_compile.signature import LOOPS_AXIS, PAST, TOTAL, InputSpec, named_results
from loopq_compile.state import CompilerState

_aten = torch.ops.aten


class AddCache(Pass):
    """Gives a causal language model a key-value cache; runs on packed programs, before `roll-loops`.

    Before: `(input_ids [batch, sequence], attention_mask?) -> (logits, ...)`. After: `(input_ids [batch, sequence],
    attention_mask [batch, past + sequence], past_key_values.N.key, .value, ...) -> {logits, ..., present.N.key,
    .value, ...}`: one pair for every attention that runs, so for every loop and layer, `[batch, heads, past, size]`.
    The new keys and values are appended to the past ones in front of each attention; what is computed from positions
    alone (masks, rotary tables, learned positions) is computed for past and new tokens, and the new ones' share taken.
    A call with `past` = 0 reads a prompt.

    Without a mask of its own a model gets one: padding, which stands on the left, is not attended to. Learned positions
    count real tokens, as Hugging Face's `generate` does. Keys and values are cached in front of the copies for grouped
    queries.

    Args:
        stacked: caches of one layer stand in one tensor for all iterations of its loop, `[loops, batch, heads, past,
            size]`, which `roll-loops` turns into a cache that a loop reads and writes by row.
        last_token: `logits` are those of the last token alone, `[batch, 1, vocabulary]`; the head runs on no other.
        kv_bits: 8 or 4 stores keys and values as integers, with scales beside them (`.key_scale`, `.value_scale`).
            Attention reads what is stored, that of new tokens too, so a prompt gives the same in one call as in many.

    Does nothing to a graph that has a cache already.

    Raises:
        LoopQError: no attention is found, a token sees later ones, or tokens are mixed outside of attention; names
            node, loop and source line.
    """

    def __init__(self, *, stacked: bool = False, last_token: bool = False, kv_bits: int | None = None) -> None:
        super().__init__()
        self.stacked, self.last_token, self.kv_bits = stacked, last_token, kv_bits

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        state = self.state(graph_module)
        if has_cache(state.signature):
            return PassResult(graph_module, False)
        regions = find_regions(graph_module)
        attention = find_attention(regions)
        inside = {node for found in attention for node in (found.node, *found.inside)}
        check_tokens(regions, inside)
        _Cacher(state, regions, attention, self.stacked, self.kv_bits).run()
        if self.last_token:
            _keep_last(regions)
        graph_module.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        for node in graph_module.graph.nodes:
            node.meta.pop("val", None)
        infer_shapes(graph_module)
        state.note(f"{len(attention)} pairs of keys and values")
        return PassResult(graph_module, True)


class _Cacher:
    def __init__(
        self, state: CompilerState, regions: Regions, attention: list[Attention], stacked: bool, bits: int | None
    ) -> None:
        self.state, self.regions, self.attention, self.bits = state, regions, attention, bits
        self.graph = regions.graph_module.graph
        self.inside = {node for found in attention for node in found.inside}
        self.slots = _slots(attention) if stacked else [[found] for found in attention]
        self.stacks = {found.node for found in attention if stacked and _loop_of(found) is not None}
        self.inputs: dict[tuple[int, str], list[fx.Node]] = {}
        self.pasts: dict[tuple[fx.Node, str], list[fx.Node]] = {}
        self.stores: dict[tuple[fx.Node, str], CacheStore] = {}
        self.variants: dict[tuple[fx.Node, bool], fx.Node] = {}

    def run(self) -> None:
        stems = {
            (found.node, kind): find_stem(self.regions, found, entry)
            for found in self.attention
            for kind, entry in (("key", found.key), ("value", found.value))
        }
        self._check_meetings()
        tables = find_tables(self.regions)
        mask = self._add_inputs(stems)
        self.rows = LastRows(self.regions, self.past, self.new, self.total)
        self._resize()
        read_by_token(tables, self.rows, mask)
        self._take_rows()
        masks = Masks(self.regions, self.rows, mask)
        for found in self.attention:
            masks.apply(found)
        presents: dict[tuple[fx.Node, str], list[fx.Node]] = {}
        for found in self.attention:
            for kind, entry in (("key", found.key), ("value", found.value)):
                presents[found.node, kind] = self._append(found, entry, kind, stems[found.node, kind])
        self._add_outputs(presents)

    def _add_inputs(self, stems: dict[tuple[fx.Node, str], tuple[fx.Node, list[fx.Node]]]) -> fx.Node:
        """The mask and caches as placeholders, and how many tokens there are; returns the mask."""
        signature, ids = self.state.signature, self.regions.ids
        specs = list(signature.inputs)
        mask = self.regions.mask
        if mask is None:
            with self.graph.inserting_after(ids):
                mask = self.graph.placeholder(ATTENTION_MASK)
            specs.insert(1, InputSpec(ATTENTION_MASK, torch.int64, ("batch", TOTAL)))
        else:
            specs = [replace(s, shape=("batch", TOTAL)) if s.name == ATTENTION_MASK else s for s in specs]
        last = [node for node in self.graph.nodes if node.op == "placeholder"][-1]
        with self.graph.inserting_after(last):
            spot = self.graph.call_function(_aten.sym_size.int, (ids, 1))
        self.new = spot
        spot.name = "new_tokens"
        for number, group in enumerate(self.slots):
            for kind in ("key", "value"):
                specs += self._add_cache(number, kind, group, stems[group[0].node, kind][0])
        past = self.inputs[len(self.slots) - 1, "value"][-1]
        axis = next(index for index, size in enumerate(specs[-1].shape) if size == PAST)
        with self.graph.inserting_before(spot):
            self.past = self.graph.call_function(_aten.sym_size.int, (past, axis))
        with self.graph.inserting_after(spot):
            self.total = self.graph.call_function(_aten.sym_size.int, (mask, 1))
        self.past.name, self.total.name = "past_tokens", "all_tokens"
        names = [spec.name for spec in specs if spec.name not in signature.parameters]
        constants = {k: v for k, v in signature.constants.items() if k != ATTENTION_MASK}
        self.state.signature = replace(
            signature, parameters=(*signature.parameters, *names), inputs=tuple(specs), constants=constants
        )
        return mask

    def _add_cache(self, number: int, kind: str, group: list[Attention], stem: fx.Node) -> list[InputSpec]:
        """Placeholders for the keys or values of one slot."""
        *leading, size = cache_shape(self.regions, stem, group[0])
        assert isinstance(size, int)
        store = CacheStore(size, stem.meta["val"].dtype, self.bits)
        specs, is_stack = [], group[0].node in self.stacks
        nodes = self.inputs[number, kind] = []
        for suffix, dtype, last in store.parts:
            name = f"{PAST_PREFIX}{number}.{kind}{suffix}"
            specs.append(InputSpec(name, dtype, (*[LOOPS_AXIS][:is_stack], *leading, last)))
            with self.graph.inserting_before(self.new):
                nodes.append(self.graph.placeholder(name.replace(".", "_")))
        for row, found in enumerate(group):
            self.stores[found.node, kind] = store
            self.pasts[found.node, kind] = list(nodes)
            if is_stack:
                with self.graph.inserting_after(self.new):
                    reads = [self.graph.call_function(_aten.select.int, (node, 0, row)) for node in nodes]
                self.pasts[found.node, kind] = reads
        return specs

    def _size(self, node: Any, total: bool) -> Any:
        """A size as the token region (`total=False`) or the region of positions needs it."""
        if node not in self.regions.sizes:
            return node
        if self.regions.is_length(node):
            return self.total if total else self.new
        if (node, total) not in self.variants:
            if node.target is _aten.sym_size.int:
                raise LoopQError(f"This size is no plain sequence length, which a cache needs: {where(node)}.")
            args = map_arg(node.args, lambda argument: self._size(argument, total))
            with self.graph.inserting_after(node):
                made = self.graph.create_node("call_function", node.target, args, name=node.name)
            set_tag(made, get_tag(node))
            self.variants[node, total] = made
        return self.variants[node, total]

    def _resize(self) -> None:
        """Positions are computed for all tokens, tokens for the new ones, scores for both."""
        for node in [*self.graph.nodes]:
            if node in self.regions.positions:
                _map_sizes(node, lambda argument: self._size(argument, True))
            elif node in self.inside:
                sizes = node.args[1] if len(node.args) > 1 else None
                if isinstance(sizes, list | tuple):
                    rows = [self._size(size, index == len(sizes) - 1) for index, size in enumerate(sizes)]
                    node.args = (node.args[0], rows, *node.args[2:])
            elif node in self.regions.tokens and node.op == "call_function":
                _map_sizes(node, lambda argument: self._size(argument, False))

    def _meetings(self) -> Iterator[tuple[fx.Node, fx.Node]]:
        """Nodes of the token region that read positions, and what they read; masks of fused attention apart."""
        fused = {found.node for found in self.attention if found.is_fused}
        for node in [*self.graph.nodes]:
            if node in self.regions.tokens and node.op == "call_function" and node not in fused:
                yield from ((node, a) for a in node.all_input_nodes if a in self.regions.positions)

    def _check_meetings(self) -> None:
        for node, argument in self._meetings():
            axes = self.regions.axes(argument)
            known = is_pointwise(node) or node.target is _aten.cat.default
            if node not in self.inside and (len(axes) > 1 or (axes and not known)):
                raise LoopQError(
                    f"This model cannot have a key-value cache: {where(node)} combines tokens with {argument.name!r}, "
                    "which runs over the sequence, in a way that is not known here."
                )
            if not axes:
                short, longer = (self.regions.compute([argument], n)[argument] for n in (5, 7))
                if not torch.equal(short, longer):
                    raise LoopQError(
                        f"This model cannot have a key-value cache: {where(argument)} depends on the length of the "
                        "text, so what is cached would change with every token."
                    )

    def _take_rows(self) -> None:
        """Where tokens meet positions, they meet those of the new tokens."""
        for node, argument in list(self._meetings()):
            axes, rank = self.regions.axes(argument), len(shape_of(argument))
            if node in self.inside:
                axes = [rank - 2] if rank - 2 in axes else []
            if axes:
                node.replace_input_with(argument, self.rows.take(argument, axes[0]))

    def _append(
        self, found: Attention, entry: tuple[fx.Node, int], kind: str, stem: tuple[fx.Node, list[fx.Node]]
    ) -> list[fx.Node]:
        """Puts `cat(past, new)` in front of an attention; returns what is cached, for stacks the new part."""
        source, between = stem
        reader, position = entry
        tag, store, axis = get_tag(found.node), self.stores[found.node, kind], len(shape_of(source)) - 2
        with inserting(self.graph, before=reader, tag=tag):
            pieces = store.write(self.graph, source)
            joined = [
                self.graph.create_node("call_function", _aten.cat.default, (pair, axis), name=f"present_{kind}")
                for pair in map(list, zip(self.pasts[found.node, kind], pieces, strict=True))
            ]
            copies = {source: store.read(self.graph, joined)}
            for node in between:
                args = map_arg(node.args, lambda a: self.total if a is self.new else copies.get(a, a))
                copies[node] = self.graph.create_node("call_function", node.target, args, dict(node.kwargs), node.name)
        last = between[-1] if between else source
        reader.args = (*reader.args[:position], copies[last], *reader.args[position + 1 :])
        return pieces if found.node in self.stacks else joined

    def _add_outputs(self, presents: dict[tuple[fx.Node, str], list[fx.Node]]) -> None:
        output = next(node for node in self.graph.nodes if node.op == "output")
        values = list(output.args[0])  # type: ignore[arg-type]
        names = named_results(self.state.signature.outputs, [_value(value) for value in values])
        for number, group in enumerate(self.slots):
            for kind in ("key", "value"):
                store = self.stores[group[0].node, kind]
                for part, (suffix, _, _) in enumerate(store.parts):
                    rows = [presents[found.node, kind][part] for found in group]
                    stacked, past = group[0].node in self.stacks, self.inputs[number, kind][part]
                    values.append(self._stack(rows, past, output) if stacked else rows[0])
                    names.append(f"{PRESENT_PREFIX}{number}.{kind}{suffix}")
        output.args = (tuple(values),)
        structure = pytree.tree_structure(dict.fromkeys(names, 0))
        self.state.signature = replace(self.state.signature, outputs=structure)

    def _stack(self, rows: list[fx.Node], past: fx.Node, output: fx.Node) -> fx.Node:
        """The new entries of a loop's iterations behind those of earlier calls, `[loops, ...]`."""
        with self.graph.inserting_before(output):
            stack = self.graph.call_function(_aten.stack.default, (rows,))
            return self.graph.call_function(_aten.cat.default, ([past, stack], len(shape_of(past)) - 2))


def _value(result: Any) -> Any:
    return result.meta.get("val") if isinstance(result, fx.Node) else None


def _map_sizes(node: fx.Node, size: Any) -> None:
    node.args, node.kwargs = map_arg(node.args, size), map_arg(node.kwargs, size)


def _loop_of(found: Attention) -> int | None:
    tag = get_tag(found.node)
    return tag.loops[0] if tag else None


def _slots(attention: list[Attention]) -> list[list[Attention]]:
    """Attention by layer: what stands at the same place of a loop's iterations shares a slot, in order."""
    slots: dict[Any, list[Attention]] = {}
    seen: dict[Any, int] = defaultdict(int)
    for number, found in enumerate(attention):
        tag = get_tag(found.node)
        key: Any = ("outside", number)
        if tag is not None:
            iteration = (tag.loops[0], tag.index[0])
            key = (tag.loops[0], seen[iteration])
            seen[iteration] += 1
        slots.setdefault(key, []).append(found)
    return list(slots.values())


def _keep_last(regions: Regions) -> None:
    """Cuts the tensor in front of the head to its last token, where nothing but the logits is behind."""
    graph = regions.graph_module.graph
    output = next(node for node in graph.nodes if node.op == "output")
    head: Any = output.args[0][0]  # type: ignore[index]
    while isinstance(head, fx.Node) and is_pointwise(head) and len(head.users) == 1:
        tokens = [argument for argument in head.all_input_nodes if argument in regions.tokens]
        head = tokens[0] if len(tokens) == 1 else None
    if not isinstance(head, fx.Node) or head.target is not _aten.linear.default or len(head.users) != 1:
        raise LoopQError("last_token=True needs logits that come straight from a linear head.")
    x = head.args[0]
    assert isinstance(x, fx.Node)
    with graph.inserting_before(head):
        last = graph.call_function(_aten.slice.Tensor, (x, regions.axes(x)[0], -1, torch.iinfo(torch.int64).max))
    head.replace_input_with(x, last)
