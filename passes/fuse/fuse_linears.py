"""`fuse-linears`: quantized linears, and the nodes that prepare their input, become two kernels."""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from loopq_compile.graph.device import device_of
from loopq_compile.graph.insert import add_constant, attribute_name, call, inserting
from loopq_compile.graph.keys import SITE
from loopq_compile.graph.loops import get_tag
from loopq_compile.graph.shapes import infer_shapes
from loopq_compile.graph.state import get_tensor
from loopq_compile.operators import ops
from loopq_compile.operators.packed import pack_weight
from loopq_compile.passes.base import Pass, PassResult
from loopq_compile.passes.fuse.fusion import Activation, Entry, Limits, Refusal, entry, match_activation, record
from loopq_compile.passes.quantize.pack_weights import drop_unused

_aten = torch.ops.aten
_Weight = tuple[str, str, int]
"""Names of codes and scales, and features per scale."""


@dataclass
class _Use:
    """One quantized tensor and the linears that read it."""

    activation: Activation
    linears: list[fx.Node]


@dataclass
class _Stack:
    """The weights of one launch: several linears side by side, with a row for each loop that has its own weights."""

    rows: list[tuple[_Weight, ...]] = field(default_factory=list)
    nodes: tuple[fx.Node, ...] = ()


class FuseLinears(Pass):
    """Makes linears compute with packed integers.

    Before: `linear(dequantize(quantize(x')), dequantize(codes, scale), bias)`, where `x'` is a norm or SwiGLU, a
    diagonal and a transform of `x`. After: `packed_linear(quantize_packed(x, ...), ...)`; the linears of a group are
    one product, split afterwards. Weights are stored packed, `packed.<group>.codes` and `.scale`, with a row for each
    loop that has its own. Every `view` becomes a `reshape`, since parts of a product are not contiguous.

    A weight is rewritten only if every use of it is. Does nothing to weights that are not packed, to group sizes that
    no kernel has, and to activations in floating point. The report in `state.results["fusion"]` says which and why.

    Args:
        limits: what one kernel can do.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        infer_shapes(graph_module)
        uses, refused = _find_uses(graph_module, self.limits)
        uses = _covered(graph_module, uses, refused)
        record(graph_module, [*(_describe(use) for use in uses), *refused])
        launches = _launches(uses)
        stacks = _make_stacks(graph_module, launches)
        # First what comes before the linears, then the linears: a SwiGLU reads linears that will be replaced.
        integers = [_insert_quantize(graph_module, use) for use, _ in launches]
        for (use, parts), pair in zip(launches, integers, strict=True):
            _replace_linears(graph_module, use, parts, stacks, pair)
        if uses:
            for node in graph_module.graph.nodes:
                if node.target is _aten.view.default:
                    node.target = _aten.reshape.default
            graph_module.graph.eliminate_dead_code()
            drop_unused(graph_module)
        return PassResult(graph_module, bool(uses))


def _find_uses(graph_module: fx.GraphModule, limits: Limits) -> tuple[list[_Use], list[Entry]]:
    """Quantized tensors that only linears read; and every other linear, with the reason."""
    uses: list[_Use] = []
    refused: list[Entry] = []
    for node in graph_module.graph.nodes:
        if node.target is ops.quantize.default and node.args[0].op != "get_attr":
            try:
                uses.append(_Use(match_activation(graph_module, node, limits), _linears(graph_module, node)))
            except Refusal as reason:
                refused.append(entry(node, reason=str(reason)))
        elif node.target is _aten.linear.default and not _reads_codes(node):
            refused.append(entry(node, reason="its input or weight stays in floating point"))
    return uses, refused


def _reads_codes(linear: fx.Node) -> bool:
    return getattr(linear.args[0], "target", None) is ops.dequantize.default


def _linears(graph_module: fx.GraphModule, quantize: fx.Node) -> list[fx.Node]:
    """The linears after `quantize`, in graph order.

    Raises:
        Refusal: something else reads the integers, or a weight is not packed or has other groups.
    """
    found = []
    for dequantize in quantize.users:
        if dequantize.target is not ops.dequantize.default or dequantize.args[1] is not quantize.args[1]:
            raise Refusal(f"its integers are also read by {dequantize.name}")
        for reader in dequantize.users:
            if reader.target is not _aten.linear.default or reader.args[0] is not dequantize:
                raise Refusal(f"its numbers are also read by {reader.name}")
            if _weight(reader) is None:
                raise Refusal(f"the weight of {reader.name} is not packed")
            if _weight(reader)[2] != quantize.args[2]:  # type: ignore[index]
                raise Refusal(f"the weight of {reader.name} has other groups")
            found.append(reader)
    order = {node: number for number, node in enumerate(graph_module.graph.nodes)}
    return sorted(found, key=order.__getitem__)


def _weight(linear: fx.Node) -> _Weight | None:
    node = linear.args[1]
    if not isinstance(node, fx.Node) or node.target is not ops.dequantize.default:
        return None
    codes, scale, group_size = node.args
    if codes.op != "get_attr" or scale.op != "get_attr":  # type: ignore[union-attr]
        return None
    return str(codes.target), str(scale.target), int(group_size)  # type: ignore[union-attr, arg-type]


def _covered(graph_module: fx.GraphModule, uses: list[_Use], refused: list[Entry]) -> list[_Use]:
    """The uses that remain when every use of each of their weights remains, too."""
    readers: dict[str, set[fx.Node]] = defaultdict(set)
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            for user in node.users:
                packed = user.target is ops.dequantize.default and user.args[0] is node
                readers[str(node.target)].update(user.users if packed else [user])
    while True:
        covered = {linear for use in uses for linear in use.linears}
        kept = []
        for use in uses:
            other = next(
                (
                    (linear, reader)
                    for linear in use.linears
                    for reader in readers[_weight(linear)[0]]  # type: ignore[index]
                    if reader not in covered
                ),
                None,
            )
            if other is None:
                kept.append(use)
            else:
                reason = f"the weight of {other[0].name} is also used by {other[1].name}, which is not fused"
                refused.append(entry(use.activation.quantize, reason=reason))
        if len(kept) == len(uses):
            return kept
        uses = kept


def _describe(use: _Use) -> Entry:
    parts = (*use.activation.parts, f"{len(use.linears)} linear" + ("s" if len(use.linears) > 1 else ""))
    return entry(use.activation.quantize, parts, use.activation.reason)


def _key(linears: list[fx.Node]) -> tuple[Any, ...]:
    """A key that launches have in common if they differ only in the loop: sites and biases."""
    return tuple((linear.meta.get(SITE, ""), *linear.args[2:]) for linear in linears)


def _launches(uses: list[_Use]) -> list[tuple[_Use, list[list[fx.Node]]]]:
    """The linears of each use, grouped by launch. A weight belongs to one launch only: the linears of a use are
    launched separately if a weight of theirs occurs with other weights elsewhere."""
    company: dict[str, set[tuple[_Weight | None, ...]]] = defaultdict(set)
    for use in uses:
        together = tuple(map(_weight, use.linears))
        for weight in together:
            company[weight[0]].add(together)  # type: ignore[index]
    launches = []
    for use in uses:
        alone = any(len(company[_weight(linear)[0]]) > 1 for linear in use.linears)  # type: ignore[index]
        launches.append((use, [[linear] for linear in use.linears] if alone else [use.linears]))
    return launches


def _make_stacks(
    graph_module: fx.GraphModule, launches: list[tuple[_Use, list[list[fx.Node]]]]
) -> dict[tuple[Any, ...], _Stack]:
    """Stores the packed weights of all launches."""
    stacks: dict[tuple[Any, ...], _Stack] = defaultdict(_Stack)
    for _, parts in launches:
        for linears in parts:
            row: Any = tuple(_weight(linear) for linear in linears)
            if row not in stacks[_key(linears)].rows:
                stacks[_key(linears)].rows.append(row)
    for number, (key, stack) in enumerate(stacks.items()):
        stack.nodes = _store(graph_module, f"packed.{number}_{attribute_name(key[0][0])}", stack, key)
    return stacks


def _store(graph_module: fx.GraphModule, name: str, stack: _Stack, key: tuple[Any, ...]) -> tuple[fx.Node, ...]:
    """Nodes of codes, scales and, if any linear has one, bias."""
    bits = max(_bits(get_tensor(graph_module, codes)) for row in stack.rows for codes, *_ in row)
    packed = []
    for row in stack.rows:
        members = [
            pack_weight(get_tensor(graph_module, codes), get_tensor(graph_module, scale), size, bits)
            for codes, scale, size in row
        ]
        packed.append([torch.cat(tensors, 1) for tensors in zip(*members, strict=True)])
    tensors = dict(zip(("codes", "scale"), map(torch.stack, zip(*packed, strict=True)), strict=True))
    biases = [parts[1] if len(parts) > 1 else None for parts in key]
    if any(bias is not None for bias in biases):
        widths = [get_tensor(graph_module, codes).shape[0] for codes, *_ in stack.rows[0]]
        tensors["bias"] = torch.cat([_bias(graph_module, *pair) for pair in zip(biases, widths, strict=True)])
    return tuple(add_constant(graph_module, f"{name}.{part}", tensor) for part, tensor in tensors.items())


def _bias(graph_module: fx.GraphModule, node: fx.Node | None, width: int) -> Tensor:
    if node is None:
        return torch.zeros(width, device=device_of(graph_module))
    return get_tensor(graph_module, str(node.target)).detach().float()


def _bits(codes: Tensor) -> int:
    return 4 if codes.min() >= -8 and codes.max() <= 7 else 8


def _insert_quantize(graph_module: fx.GraphModule, use: _Use) -> list[fx.Node]:
    """Codes and scales of what the linears of `use` read."""
    graph, old = graph_module.graph, use.activation.quantize
    with inserting(graph, before=old, tag=get_tag(old), site=old.meta.get(SITE, "")):
        made = call(graph, ops.quantize_packed.default, *use.activation.arguments())
        return [graph.call_function(operator.getitem, (made, number)) for number in (0, 1)]


def _replace_linears(
    graph_module: fx.GraphModule,
    use: _Use,
    parts: list[list[fx.Node]],
    stacks: dict[tuple[Any, ...], _Stack],
    integers: list[fx.Node],
) -> None:
    graph, old = graph_module.graph, use.activation.quantize
    for linears in parts:
        stack = stacks[_key(linears)]
        row = stack.rows.index(tuple(_weight(linear) for linear in linears))  # type: ignore[misc]
        codes, scale, bias = (*stack.nodes, None)[:3]
        numbers = (row, use.activation.group_size, linears[0].meta["val"].dtype)
        first = linears[0]
        with inserting(graph, before=first, tag=get_tag(first), site=old.meta.get(SITE, "")):
            result = call(graph, ops.packed_linear.default, *integers, codes, scale, bias, *numbers)
            results = [result]
            if len(linears) > 1:
                sizes = [linear.meta["val"].shape[-1] for linear in linears]
                split = call(graph, _aten.split_with_sizes.default, result, sizes, -1)
                results = [graph.call_function(operator.getitem, (split, number)) for number in range(len(sizes))]
        for linear, replacement in zip(linears, results, strict=True):
            linear.replace_all_uses_with(replacement)
