"""A program in differentiable form, for calibration.

`dequantize(quantize(x, s), s)` becomes `fake_quantize(x, s)`. Quantized weights are held as integers between the
products that read them (`held_weights`); a weight's gradient is the sum over its uses. What else depends only on
constants is computed once per step and shared by all loops, and what depends on no learned constant, once for all
steps. The rest is cut into segments, about one for each call of a layer. With `recompute`, only the inputs of segments
are kept for the backward pass; everything inside a segment is computed again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from loopq_compile.calibration.held_weights import HeldWeight, LatentWeight, held_linear, hold_weights
from loopq_compile.calibration.learnable import Value
from loopq_compile.calibration.regions import fuse_regions
from loopq_compile.calibration.sharding import Rows
from loopq_compile.calibration.weight_chain import Integers, WeightChain
from loopq_compile.graph.keys import SITE
from loopq_compile.graph.recurrence import weight_roots
from loopq_compile.graph.state import copy_nodes, get_tensor
from loopq_compile.operators import ops

_SEARCH = 0.5
"""A cut may move by this share of a segment's length to a place where fewer tensors cross."""
_LARGEST = 128
"""Nodes of a segment, about: the time to find regions grows with the third power of their number."""


@dataclass
class Segment:
    """A stretch of the graph: a module that maps `inputs` (node names) to `outputs`."""

    module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class Student:
    """The differentiable form of a program's graph.

    Args:
        graph_module: the program's graph; it is copied, its tensors are shared.
        watched: names of nodes whose values `run` returns in addition to the results.
        recompute: whether to keep only what crosses segments for the backward pass.
        segments: number of segments; None for one per four groups of linears, and more where these are far apart.
        learned: names of the constants that `values` may replace; None for any.
        equal_loops: the chains of a weight have the same values in all loops, as right after `widen`. They share their
            integers, and every gradient goes through its chain at once, so that nothing is kept for each loop.
        gradients: type of the sums of weights' gradients.
        rows: what this process keeps for each weight; by default everything. Divided, all processes must run the same.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        watched: Sequence[str] = (),
        recompute: bool = True,
        segments: int | None = None,
        learned: Collection[str] | None = None,
        equal_loops: bool = False,
        gradients: torch.dtype = torch.float32,
        rows: Rows | None = None,
    ) -> None:
        graph = copy_nodes(graph_module.graph)
        fuse_pairs(graph)
        self.recompute, self._equal_loops, self._gradients = recompute, equal_loops, gradients
        self._rows = rows or Rows()
        self.tensors: dict[str, Tensor] = {
            str(node.target): get_tensor(graph_module, str(node.target))
            for node in graph.nodes
            if node.op == "get_attr"
        }
        """Every constant of the graph by name."""
        self._chains = hold_weights(graph)
        held = {chain.name for chain in self._chains}
        nodes = [node for node in graph.nodes if node.op != "output"]
        self.placeholders = tuple(node.name for node in nodes if node.op == "placeholder")
        self._results = next(node for node in graph.nodes if node.op == "output").args[0]
        kept = {node.name for node in _flat(self._results)} | set(watched)
        constant = weight_roots(graph)
        body = [node for node in nodes if node not in constant and node.op != "placeholder"]
        moving = {node for node, roots in constant.items() if learned is None or not roots.isdisjoint(learned)}
        computed = [node for node in nodes if node in constant and node.op != "get_attr"]
        changing = [node for node in computed if node in moving]
        self._prepare = make_segment(changing, body, kept)
        self._attributes = {
            node.name: str(node.target) for node in nodes if node.op == "get_attr" and node.name not in held
        }
        still = make_segment([node for node in computed if node not in moving], [*changing, *body], kept)
        self._fixed: dict[str, Any] = {}
        with torch.no_grad():
            store_results(self._fixed, still, still.module(*[self._constant(name) for name in still.inputs]))
            for chain in self._chains:
                if learned is not None and not set(chain.targets).intersection(learned):
                    self._fixed[chain.name] = self._held(chain, {}, [])
        cuts = _cuts(body, segments or _default_segments(body))
        self._segments = [
            make_segment(body[start:end], body[end:], kept)
            for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True)
            if end > start
        ]
        for segment in self._segments:
            fuse_regions(segment.module)
        self._last_use = _last_uses(self._segments, kept)

    def run(self, inputs: Sequence[Any], values: Mapping[str, Value]) -> tuple[Any, dict[str, Any]]:
        """Results of the graph, and values of all watched nodes.

        Args:
            inputs: in the order of the placeholders.
            values: tensors that replace constants, by constant name: the current state of what is learned.
        """
        return self.run_prepared(inputs, self.prepare(values))

    def prepare(self, values: Mapping[str, Value]) -> dict[str, Any]:
        """All constant nodes by name; what depends on `values` is computed."""
        known: dict[str, Any] = dict(self._fixed)
        for name, target in self._attributes.items():
            known[name] = self._value(target, values)
        integers: list[tuple[list[Tensor], Integers]] = []
        for chain in self._chains:
            if chain.name not in known:
                known[chain.name] = self._held(chain, values, integers)
        store_results(known, self._prepare, self._prepare.module(*[known[name] for name in self._prepare.inputs]))
        return known

    def run_prepared(self, inputs: Sequence[Any], constants: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """`run` with the `constants` that `prepare` returned, which several batches may share."""
        known = {**constants, **dict(zip(self.placeholders, inputs, strict=True))}
        for number, segment in enumerate(self._segments):
            arguments = [known[name] for name in segment.inputs]
            if self.recompute and torch.is_grad_enabled():
                result = checkpoint(segment.module, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                result = segment.module(*arguments)
            store_results(known, segment, result)
            for name in self._last_use.get(number, ()):
                known.pop(name, None)
        results = [known[item.name] if isinstance(item, fx.Node) else item for item in self._results]
        return results, known

    def _constant(self, name: str) -> Tensor:
        return self.tensors[self._attributes[name]]

    def _value(self, target: str, values: Mapping[str, Value]) -> Value:
        return values[target] if target in values else self.tensors[target]

    def _held(
        self, chain: WeightChain, values: Mapping[str, Value], known: list[tuple[list[Tensor], Integers]]
    ) -> tuple[HeldWeight, Tensor | None]:
        """What `held_linear` takes; `known` are what chains before it read and gave, for loops that are equal."""
        read = [self._value(target, values) for target in chain.targets]
        tensors = [value for value in read if isinstance(value, Tensor)]
        if chain.latent is not None:
            scale = read[chain.latent.scale]
            assert isinstance(scale, Tensor)
            latent = LatentWeight(chain, read[chain.latent.numbers], scale, self._gradients, self._rows)
            return latent, latent.token()
        integers = next((found for other, found in known if _equal(other, tensors)), None)
        if integers is None:
            integers = chain.codes(tensors)
            if self._equal_loops:
                known.append((tensors, integers))
        codes, scale = integers
        kept = self._rows.own(codes), scale
        weight = HeldWeight(chain, tensors, kept, not self._equal_loops, self._gradients, self._rows)
        return weight, weight.token()


def _equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether two chains read the same weight and equal tables."""
    largest = max(x.numel() for x in first)
    if len(first) != len(second) or not any(x is y and x.numel() == largest for x in first for y in second):
        return False
    return all(x is y or torch.equal(x, y) for x, y in zip(first, second, strict=True))


def store_results(known: dict[str, Any], segment: Segment, result: Any) -> None:
    """Adds the results of `segment` to the `known` values by node name."""
    known.update(zip(segment.outputs, result, strict=True))


def _flat(items: Any) -> list[fx.Node]:
    return [item for item in items if isinstance(item, fx.Node)]


def fuse_pairs(graph: fx.Graph) -> None:
    """Replaces quantize-dequantize pairs by their straight-through form; includes a scale computed from what they
    round."""
    for node in list(graph.nodes):
        if node.target is ops.dequantize.default and node.args[0].target is ops.quantize.default:
            x, scale, *limits = node.args[0].args
            target = ops.fake_quantize.default
            if scale.target is ops.dynamic_scale.default and scale.args[0] is x:
                target, limits = ops.fake_quantize_dynamic.default, [*limits, scale.args[3]]
                scale = scale.args[1]
            with graph.inserting_before(node):
                fused = graph.create_node("call_function", target, (x, scale, *limits), name=node.name)
            fused.meta = dict(node.meta)
            node.replace_all_uses_with(fused)
            graph.erase_node(node)
    graph.eliminate_dead_code()


def make_segment(nodes: Sequence[fx.Node], later: Sequence[fx.Node], kept: set[str]) -> Segment:
    """`nodes` as a separate module; its results are what `later` nodes read and what is `kept`."""
    graph, copied = fx.Graph(), dict[fx.Node, fx.Node]()
    own = set(nodes)
    inputs: dict[fx.Node, None] = {}
    for node in nodes:
        inputs.update(dict.fromkeys(argument for argument in node.all_input_nodes if argument not in own))
    for node in inputs:
        copied[node] = graph.placeholder(node.name)
    for node in nodes:
        copied[node] = graph.node_copy(node, copied.__getitem__)
    read = {argument for node in later for argument in node.all_input_nodes}
    outputs = [node for node in nodes if node in read or node.name in kept]
    graph.output(tuple(copied[node] for node in outputs))
    module = fx.GraphModule(torch.nn.Module(), graph)
    return Segment(module, tuple(node.name for node in inputs), tuple(node.name for node in outputs))


def _default_segments(body: Sequence[fx.Node]) -> int:
    groups = {
        node.args[0]
        for node in body
        if node.target in (torch.ops.aten.linear.default, held_linear) and SITE in node.meta
    }
    return max(1, len(groups) // 4, len(body) // _LARGEST)


def _cuts(body: Sequence[fx.Node], segments: int) -> list[int]:
    """Positions in `body` at which to cut: near even spacing, where the fewest tensors cross."""
    position = {node: i for i, node in enumerate(body)}
    crossing = [0] * (len(body) + 1)
    for i, node in enumerate(body):
        last = max((position.get(user, len(body)) for user in node.users), default=i)
        crossing[i + 1] += 1
        crossing[min(last + 1, len(body))] -= 1
    for i in range(1, len(crossing)):
        crossing[i] += crossing[i - 1]
    size = len(body) / segments
    reach = max(1, int(size * _SEARCH))
    cuts: list[int] = []
    for k in range(1, segments):
        middle = round(k * size)
        low, high = max(middle - reach, (cuts[-1] if cuts else 0) + 1), min(middle + reach, len(body) - 1)
        if low <= high:
            cuts.append(min(range(low, high + 1), key=lambda i: (crossing[i], abs(i - middle))))
    return cuts


def _last_uses(segments: Sequence[Segment], kept: set[str]) -> dict[int, list[str]]:
    """By segment, the values that no later segment needs."""
    last: dict[str, int] = {}
    for number, segment in enumerate(segments):
        for name in (*segment.inputs, *segment.outputs):
            last[name] = number
    found: dict[int, list[str]] = {}
    for name, number in last.items():
        if name not in kept:
            found.setdefault(number, []).append(name)
    return found
