"""`add-cache`: a call takes only the new tokens, with the keys and values of those before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from loopq_compile.errors import LoopQError
from loopq_compile.graph.caches import PAST_PREFIX, PRESENT_PREFIX, has_cache
from loopq_compile.graph.insert import inserting
from loopq_compile.graph.loops import get_tag, set_tag
from loopq_compile.graph.shapes import infer_shapes
from loopq_compile.graph.signature import LOOPS_AXIS, PAST, TOTAL, InputSpec, named_results
from loopq_compile.graph.state import CompilerState
from loopq_compile.passes.base import Pass, PassResult
from loopq_compile.passes.cache.absolute_positions import RealTokens, find_absolute
from loopq_compile.passes.cache.attention import Attention, Source, find_attention, find_source
from loopq_compile.passes.cache.cache_masks import Masks
from loopq_compile.passes.cache.cache_regions import ATTENTION_MASK, Regions, is_pointwise, shape_of, where
from loopq_compile.passes.cache.cache_slots import Pair, Slot, find_pairs, find_slots
from loopq_compile.passes.cache.cache_store import CacheStore, cache_shape
from loopq_compile.passes.cache.causality import check_causal
from loopq_compile.passes.cache.last_rows import LastRows
from loopq_compile.passes.cache.plain_reads import write_plainly
from loopq_compile.passes.cache.token_flow import TokenFlow

_aten = torch.ops.aten


class AddCache(Pass):
    """Gives a causal language model a key-value cache; runs on packed programs, before `roll-loops`.

    Before: `(input_ids [batch, sequence], attention_mask?) -> (logits, ...)`. After: `(input_ids [batch, sequence],
    attention_mask [batch, past + sequence], past_key_values.N.key, .value, ...) -> {logits, ..., present.N.key, .value,
    ...}`: one pair for every attention that runs, that is for every loop and layer, `[batch, heads, past, size]`. The
    new keys and values are appended to the past ones where they are computed. What depends only on positions (masks,
    rotary tables, learned positions) is computed for past and new tokens, and the new tokens' share is taken. An
    attention that reads keys of several passes reads the cache of each. A call with `past` = 0 reads a prompt.

    A model without a mask gets one: padding, which is on the left, is not attended to. Positions that are added to
    tokens, multiplied or joined with them count real tokens, as Hugging Face's `generate` does. Keys and values are
    cached before they are copied for grouped queries.

    Args:
        stacked: one tensor holds a layer's caches for all iterations of its loop, `[loops, batch, heads, past, size]`;
            `roll-loops` turns it into a cache that a loop reads and writes by row.
        last_token: `logits` are those of the last token only, `[batch, 1, vocabulary]`; the head runs only on it.
        kv_bits: 8 or 4 stores keys and values as integers, with scales next to them (`.key_scale`, `.value_scale`).
            Attention reads stored values, also for new tokens, so a prompt gives the same result in one call or many.

    Does nothing to a graph that already has a cache.

    Raises:
        LoopQError: no attention is found, a token sees later ones, or tokens are mixed outside attention; the message
            names node, loop and source line.
    """

    def __init__(self, *, stacked: bool = False, last_token: bool = False, kv_bits: int | None = None) -> None:
        super().__init__()
        self.stacked, self.last_token, self.kv_bits = stacked, last_token, kv_bits

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        state = self.state(graph_module)
        if has_cache(state.signature):
            return PassResult(graph_module, False)
        regions = write_plainly(graph_module)
        attention = find_attention(regions)
        for found in attention:
            check_causal(regions, found)
        inside = {node for found in attention for node in (found.node, *found.inside)}
        TokenFlow(regions, inside, {found.node for found in attention}).check()
        cacher = _Cacher(state, regions, attention, self.stacked, self.kv_bits)
        cacher.run()
        if self.last_token:
            _keep_last(regions)
        graph_module.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        for node in graph_module.graph.nodes:
            node.meta.pop("val", None)
        infer_shapes(graph_module)
        state.note(f"{len(cacher.pairs)} pairs of keys and values")
        return PassResult(graph_module, True)


class _Cacher:
    def __init__(
        self, state: CompilerState, regions: Regions, attention: list[Attention], stacked: bool, bits: int | None
    ) -> None:
        self.state, self.regions, self.attention, self.bits = state, regions, attention, bits
        self.graph = regions.graph_module.graph
        self.inside = {node for found in attention for node in found.inside}
        self.sources = {
            (found.node, kind): find_source(regions, found, entry)
            for found in attention
            for kind, entry in (("key", found.key), ("value", found.value))
        }
        self.pairs = find_pairs(attention, self.sources)
        self.slots = find_slots(self.pairs, [loop.count for loop in state.loops.loops], stacked)
        self.inputs: dict[tuple[int, str], list[fx.Node]] = {}
        self.pasts: dict[tuple[Pair, str], list[fx.Node]] = {}
        self.stores: dict[tuple[int, str], CacheStore] = {}
        self.presents: dict[tuple[Pair, str], list[fx.Node]] = {}
        self.cached: dict[fx.Node, fx.Node] = {}
        self.variants: dict[tuple[fx.Node, bool], fx.Node] = {}

    def run(self) -> None:
        self._check_meetings()
        absolute = find_absolute(self.regions, self.attention, list(self._meetings()))
        mask = self._add_inputs()
        self.rows = LastRows(self.regions, self.past, self.new, self.total)
        self._resize()
        self._take_rows(absolute, mask)
        masks = Masks(self.regions, self.rows, mask)
        for found in self.attention:
            masks.apply(found)
        for number, slot in enumerate(self.slots):
            for pair in slot.pairs:
                for kind in ("key", "value"):
                    self._append(pair, kind, self.stores[number, kind], slot.loop is not None)
        for found in self.attention:
            for kind, entry in (("key", found.key), ("value", found.value)):
                self._read(found, entry, self.sources[found.node, kind])
        self._add_outputs()

    def _add_inputs(self) -> fx.Node:
        """Adds the mask, the caches and the numbers of tokens as nodes; returns the mask."""
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
        for number, slot in enumerate(self.slots):
            for kind in ("key", "value"):
                specs += self._add_cache(number, kind, slot)
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

    def _add_cache(self, number: int, kind: str, slot: Slot) -> list[InputSpec]:
        """Placeholders for the keys or values of one slot."""
        stem = slot.pairs[0].part(kind)
        *leading, size = cache_shape(self.regions, stem)
        assert isinstance(size, int)
        store = self.stores[number, kind] = CacheStore(size, stem.meta["val"].dtype, self.bits)
        # The first loop's count is chosen at run time, that of other loops is fixed.
        loops = [] if slot.loop is None else [len(slot.pairs) if slot.loop else LOOPS_AXIS]
        specs = []
        nodes = self.inputs[number, kind] = []
        for suffix, dtype, last in store.parts:
            name = f"{PAST_PREFIX}{number}.{kind}{suffix}"
            specs.append(InputSpec(name, dtype, (*loops, *leading, last)))
            with self.graph.inserting_before(self.new):
                nodes.append(self.graph.placeholder(name.replace(".", "_")))
        for row, pair in enumerate(slot.pairs):
            self.pasts[pair, kind] = list(nodes)
            if slot.loop is not None:
                with self.graph.inserting_after(self.new):
                    reads = [self.graph.call_function(_aten.select.int, (node, 0, row)) for node in nodes]
                self.pasts[pair, kind] = reads
        return specs

    def _size(self, node: Any, total: bool) -> Any:
        """A size as the token region (`total=False`) or the region of positions needs it."""
        if node not in self.regions.sizes:
            return node
        if self.regions.is_length(node):
            return self.total if total else self.new
        if (node, total) not in self.variants:
            if node.target is _aten.sym_size.int:
                if node.args[0] in self.regions.tokens and not total:
                    return node  # the size of a tensor of only the new tokens
                raise LoopQError(f"This size is not the plain sequence length, which a cache needs: {where(node)}.")
            args = map_arg(node.args, lambda argument: self._size(argument, total))
            with self.graph.inserting_after(node):
                made = self.graph.create_node("call_function", node.target, args, name=node.name)
            set_tag(made, get_tag(node))
            self.variants[node, total] = made
        return self.variants[node, total]

    def _resize(self) -> None:
        """Resizes positions to all tokens, the token region to the new ones, and scores to both."""
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
        """Nodes of the token region that read positions, and what they read; except masks of fused attention."""
        fused = {found.node for found in self.attention if found.is_fused}
        for node in [*self.graph.nodes]:
            if node in self.regions.tokens and node.op == "call_function" and node not in fused:
                yield from ((node, a) for a in node.all_input_nodes if a in self.regions.positions)

    def _check_meetings(self) -> None:
        for node, argument in self._meetings():
            axes = self.regions.axes(argument)
            plain = not axes or shape_of(argument)[axes[0]].node.expr == self.regions.symbol
            if node not in self.inside and (len(axes) > 1 or not plain):
                raise LoopQError(
                    f"This model cannot have a key-value cache: {where(node)} combines tokens with {argument.name!r}, "
                    "which runs over the sequence, in a way that is not known here. Use cache=False."
                )
            if not axes:
                short, longer = (self.regions.compute([argument], n)[argument] for n in (5, 7))
                if not torch.equal(short, longer):
                    raise LoopQError(
                        f"This model cannot have a key-value cache: {where(argument)} depends on the length of the "
                        "text, so what is cached would change with every token."
                    )

    def _take_rows(self, absolute: set[tuple[fx.Node, fx.Node]], mask: fx.Node) -> None:
        """Combines tokens with the positions of the new tokens; absolute positions do not count padding."""
        numbered = RealTokens(self.rows, mask) if absolute else None
        for node, argument in list(self._meetings()):
            if numbered is not None and (node, argument) in absolute:
                node.replace_input_with(argument, numbered.take(node, argument))
                continue
            axes, rank = self.regions.axes(argument), len(shape_of(argument))
            if node in self.inside:
                axes = [rank - 2] if rank - 2 in axes else []
            if axes:
                node.replace_input_with(argument, self.rows.take(argument, axes[0]))

    def _append(self, pair: Pair, kind: str, store: CacheStore, stacked: bool) -> None:
        """Joins past and new keys or values at the place where the new ones are computed."""
        stem = pair.part(kind)
        with inserting(self.graph, before=stem.next, tag=get_tag(stem)):
            pieces = store.write(self.graph, stem)
            axis = len(shape_of(stem)) - 2
            joined = [
                self.graph.create_node("call_function", _aten.cat.default, (both, axis), name=f"present_{kind}")
                for both in map(list, zip(self.pasts[pair, kind], pieces, strict=True))
            ]
            self.cached[stem] = store.read(self.graph, joined)
        self.presents[pair, kind] = pieces if stacked else joined

    def _read(self, found: Attention, entry: tuple[fx.Node, int], source: Source) -> None:
        """Lets an attention read the cache, through copies of the nodes in between."""
        reader, position = entry
        copies = {stem: self.cached[stem] for stem in source.stems}
        sizes = {made: node for (node, _), made in self.variants.items()} | {self.new: self.new}
        between = [node for node in self.graph.nodes if node in source.between]
        for size in {a for node in between for a in node.all_input_nodes if a in sizes}:
            copies[size] = self.total if size is self.new else self._size(sizes[size], True)
        with inserting(self.graph, before=reader, tag=get_tag(found.node)):
            for node in between:
                args, kwargs = map_arg((node.args, node.kwargs), lambda a: copies.get(a, a))
                copies[node] = self.graph.create_node("call_function", node.target, args, kwargs, node.name)
        end = copies[source.end]
        reader.args = (*reader.args[:position], end, *reader.args[position + 1 :])

    def _add_outputs(self) -> None:
        output = next(node for node in self.graph.nodes if node.op == "output")
        values = list(output.args[0])  # type: ignore[arg-type]
        names = named_results(self.state.signature.outputs, [_value(value) for value in values])
        for number, slot in enumerate(self.slots):
            for kind in ("key", "value"):
                for part, (suffix, _, _) in enumerate(self.stores[number, kind].parts):
                    rows = [self.presents[pair, kind][part] for pair in slot.pairs]
                    past = self.inputs[number, kind][part]
                    values.append(rows[0] if slot.loop is None else self._stack(rows, past, output))
                    names.append(f"{PRESENT_PREFIX}{number}.{kind}{suffix}")
        output.args = (tuple(values),)
        structure = pytree.tree_structure(dict.fromkeys(names, 0))
        self.state.signature = replace(self.state.signature, outputs=structure)

    def _stack(self, rows: list[fx.Node], past: fx.Node, output: fx.Node) -> fx.Node:
        """Appends the new entries of a loop's iterations to those of earlier calls, `[loops, ...]`."""
        with self.graph.inserting_before(output):
            stack = self.graph.call_function(_aten.stack.default, (rows,))
            return self.graph.call_function(_aten.cat.default, ([past, stack], len(shape_of(past)) - 2))


def _value(result: Any) -> Any:
    return result.meta.get("val") if isinstance(result, fx.Node) else None


def _map_sizes(node: fx.Node, size: Any) -> None:
    node.args, node.kwargs = map_arg(node.args, size), map_arg(node.kwargs, size)


def _keep_last(regions: Regions) -> None:
    """Cuts the tensor before the head to its last token, if only the logits depend on it."""
    graph = regions.graph_module.graph
    output = next(node for node in graph.nodes if node.op == "output")
    head: Any = output.args[0][0]  # type: ignore[index]
    if isinstance(head, fx.Node) and not regions.axes(head):
        return  # the model does so itself
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
