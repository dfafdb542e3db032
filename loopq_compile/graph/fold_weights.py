"""Plain weights: what a model computes from its parameters before a product becomes a stored weight.

`F.linear(x, weight.to(x.dtype))`, `weight_norm` and other parametrizations, `weight * mask` and slices of a fused
weight leave operators between a parameter and its product. They give the same result in every call, so they are
computed once, by the same operators, and the product reads the result. A chain that occurs in several iterations
becomes one weight, so that loops are still found.

This module also tells which operators return their input because there is nothing to cast, copy or reshape.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from loopq_compile.graph.constants import evaluate, independent_nodes
from loopq_compile.graph.state import free_name, get_tensor, remove_tensor, set_tensor

_aten = torch.ops.aten
_CASTS = {
    *(_aten.to.dtype, _aten.to.other, _aten.to.dtype_layout, _aten.to.device, _aten._to_copy.default),
    _aten.type_as.default,
}
_COPIES = {_aten.clone.default, _aten.contiguous.default, _aten.lift_fresh_copy.default}
_SHAPES = {
    *(_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default, _aten.view_as.default),
    *(_aten.expand.default, _aten.expand_as.default, _aten.reshape_as.default),
    _aten.flatten.using_ints,
    _aten.slice.Tensor,
}
_TRANSPOSES = {_aten.t.default, _aten.transpose.int, _aten.permute.default, _aten.numpy_T.default}
_WEIGHT_OPERANDS = {
    _aten.linear.default: 1,
    _aten.embedding.default: 0,
    _aten.mm.default: 1,
    _aten.matmul.default: 1,
    _aten.addmm.default: 2,
}
"""Which argument of an operator is its weight."""
_PARAMETRIZED = re.compile(r"^(.*?)parametrizations\.(\w+)\.(?:original\d*|\d+\..+)$")
_PART_OF_A_WEIGHT = re.compile(r"(?<=weight)_(orig|v|g|u)$")


def returns_its_input(node: fx.Node) -> bool:
    """Whether a cast, copy, or change of shape has nothing to do: same type, device, sizes, and order in memory."""
    source = node.args[0] if node.args else None
    before = source.meta.get("val") if isinstance(source, fx.Node) else None
    after = node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    if node.target in _CASTS | _COPIES:
        handed_out = any(user.op == "output" for user in node.users)  # the caller may write to a copy
        same = (before.dtype, before.device) == (after.dtype, after.device)
        return same and not handed_out and _same_sizes(before.stride(), after.stride())
    return node.target in _SHAPES and _same_sizes(before.shape, after.shape)


def _same_sizes(left: Any, right: Any) -> bool:
    return len(left) == len(right) and all(statically_known_true(a == b) for a, b in zip(left, right, strict=True))


@dataclass
class _Chain:
    """Nodes that compute the same value from the same parameters, and the names of those parameters."""

    roots: tuple[str, ...]
    ends: list[fx.Node] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Entries of the result."""
        return int(self.ends[0].meta["val"].numel())


def fold_weights(graph_module: fx.GraphModule) -> None:
    """Stores the results of constant chains between parameters and products, as parameters; a second run does nothing.

    Before: `linear(x, to(weight, bfloat16))`. After: `linear(x, weight)`, where `weight` is stored in bfloat16. The
    result keeps the name of the parameter if nothing else reads that parameter. Otherwise `_folded` is added, or
    `_part0`, `_part1` for several results of one parameter.

    A chain stays where the results would need more memory than the parameters (a product of two thin matrices,
    a scale that differs in each iteration). The parameters of the user's model are never changed.
    """
    chains = _find_chains(graph_module)
    folded = [chain for group in _by_parameters(chains) if _saves_room(graph_module, group) for chain in group]
    if not folded:
        return
    values = dict(evaluate(graph_module, [chain.ends[0] for chain in folded]))
    names = _names(graph_module, folded)
    for chain, name in zip(folded, names, strict=True):
        _store(graph_module, chain, name, values.pop(chain.ends[0]))
    graph_module.graph.eliminate_dead_code()
    read = {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}
    for root in {root for chain in folded for root in chain.roots} - read:
        remove_tensor(graph_module, root)
    graph_module.recompile()


def _find_chains(graph_module: fx.GraphModule) -> list[_Chain]:
    """What to fold, in graph order; equal computations are one chain."""
    constant = independent_nodes(graph_module.graph)
    roots: dict[fx.Node, dict[str, None]] = {}
    keys: dict[fx.Node, str] = {}
    numbers: dict[str, str] = {}
    chains: dict[str, _Chain] = {}
    for node in graph_module.graph.nodes:
        if node not in constant:
            continue
        inputs = node.all_input_nodes
        roots[node] = {str(node.target): None} if node.op == "get_attr" else {}
        for argument in inputs:
            roots[node] |= roots[argument]
        spelled = repr((str(node.target), *fx.map_arg((node.args, dict(node.kwargs)), keys.__getitem__)))
        keys[node] = numbers.setdefault(spelled, f"%{len(numbers)}")
        if node.op != "get_attr" and roots[node] and _is_end(graph_module, node, constant):
            chains.setdefault(keys[node], _Chain(tuple(roots[node]))).ends.append(node)
    return list(chains.values())


def _is_end(graph_module: fx.GraphModule, node: fx.Node, constant: set[fx.Node]) -> bool:
    """Whether a constant node is the weight of a product or a table to look up, or casts a parameter for any use."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    readers = [user for user in node.users if user not in constant]
    products = [user for user in readers if _weight_of(user) is node]
    if node.target not in _TRANSPOSES:  # `canonicalize-linears` removes these from products other than `linear`
        turned = [turn for turn in node.users if turn in constant and turn.target in _TRANSPOSES]
        products += [user for turn in turned for user in turn.users if _weight_of(user) is turn and _takes_turned(user)]
    elif node.meta["val"].ndim == 2:
        products = [user for user in products if not _takes_turned(user)]
    if products:
        return True
    source: Any = node.args[0] if node.target in _CASTS else None
    is_parameter = isinstance(source, fx.Node) and source.op == "get_attr"
    return is_parameter and bool(readers) and isinstance(get_tensor(graph_module, str(source.target)), nn.Parameter)


def _takes_turned(node: fx.Node) -> bool:
    return node.target not in (_aten.linear.default, _aten.embedding.default)


def _weight_of(node: fx.Node) -> Any:
    """The argument that is the weight of a product or the table of a look-up."""
    place = _WEIGHT_OPERANDS.get(node.target)  # type: ignore[call-overload]
    return node.args[place] if place is not None and len(node.args) > place else None


def _by_parameters(chains: list[_Chain]) -> list[list[_Chain]]:
    """Chains that have parameters in common, directly or through others."""
    groups: list[tuple[set[str], list[_Chain]]] = []
    for chain in chains:
        touching = [group for group in groups if group[0] & set(chain.roots)]
        merged = (set(chain.roots).union(*(names for names, _ in touching)), [c for _, cs in touching for c in cs])
        merged[1].append(chain)
        groups = [group for group in groups if group not in touching] + [merged]
    return [members for _, members in groups]


def _saves_room(graph_module: fx.GraphModule, group: list[_Chain]) -> bool:
    roots = {root for chain in group for root in chain.roots}
    return sum(chain.size for chain in group) <= sum(get_tensor(graph_module, root).numel() for root in roots)


def _names(graph_module: fx.GraphModule, chains: list[_Chain]) -> list[str]:
    """A name for every result, after the largest of its parameters."""
    bases = [_base(max(chain.roots, key=lambda root: get_tensor(graph_module, root).numel())) for chain in chains]
    ends = {end for chain in chains for end in chain.ends}
    still_read = _still_read(graph_module.graph, ends)
    numbers: dict[str, int] = defaultdict(int)
    names: list[str] = []
    for base in bases:
        only = bases.count(base) == 1
        stem = base.removesuffix(".weight")
        mark = "_folded" if only else f"_part{numbers[base]}"
        numbers[base] += 1
        name = base if only and base not in still_read else stem + mark + base.removeprefix(stem)
        replaced = name == base and any(base in chain.roots for chain in chains)
        names.append(name if replaced else free_name(graph_module, name))
    return names


def _base(root: str) -> str:
    """The name of the weight that a parameter represents: `fc.weight` for `fc.parametrizations.weight.original0`."""
    parametrized = _PARAMETRIZED.match(root)
    return parametrized[1] + parametrized[2] if parametrized else _PART_OF_A_WEIGHT.sub("", root)


def _still_read(graph: fx.Graph, ends: set[fx.Node]) -> set[str]:
    """Parameters that are also read other than through `ends`."""
    needed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node.op == "placeholder" or (node in needed and node not in ends):
            needed.update(node.all_input_nodes)
    return {str(node.target) for node in needed if node.op == "get_attr"}


def _store(graph_module: fx.GraphModule, chain: _Chain, name: str, value: Tensor) -> None:
    graph = graph_module.graph
    tensors = [get_tensor(graph_module, root) for root in chain.roots]
    shared = {tensor.untyped_storage()._cdata for tensor in tensors}
    if value.untyped_storage()._cdata in shared or not value.is_contiguous():
        value = value.clone(memory_format=torch.contiguous_format)  # a slice, whose data belongs to the user's model
    if any(isinstance(tensor, nn.Parameter) for tensor in tensors):
        value = nn.Parameter(value, requires_grad=False)
    set_tensor(graph_module, name, value)
    first = next(node for node in graph.nodes if node.op == "get_attr" and str(node.target) in chain.roots)
    with graph.inserting_before(first):
        stored = graph.get_attr(name)
    stored.meta["val"] = chain.ends[0].meta["val"].contiguous()
    for end in chain.ends:
        end.replace_all_uses_with(stored)
