"""`fold-diagonals`: moves factors per channel into the norm's gain before them."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from loopq_compile.graph.keys import LEARN
from loopq_compile.graph.names import shown_name
from loopq_compile.graph.state import get_tensor, set_tensor
from loopq_compile.passes.base import Pass, PassResult
from loopq_compile.passes.transforms.tables import group_tables

_aten = torch.ops.aten


class FoldDiagonals(Pass):
    """Removes products with a transform's diagonal from the running program where another factor can absorb them.

    Before: a group reads `norm(x) * diagonal`, one diagonal for all loops. After: the group reads `norm(x)`, and gain
    and bias of the norm are multiplied by the diagonal. The weights keep the inverse before them, which
    `pack-weights` folds. A folded diagonal can no longer be learned.

    This is exact where the gain belongs only to this group: only the group's linears read the norm, in every loop, and
    nothing else reads gain or bias. It covers RMS and layer norms, and any product with one factor per channel, as at
    the end of norms that a model spells out. Other diagonals stay; the log says why.

    Does nothing to diagonals with a row per loop: all loops share the gain.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        state = self.state(graph_module)
        folded: list[str] = []
        kept: dict[str, list[str]] = {}
        for group, parts in group_tables(graph_module).items():
            if "diagonal" not in parts:
                continue
            products = _products(parts["diagonal"])
            if not products:
                continue
            reason = _fold(graph_module, parts["diagonal"], products)
            if reason is None:
                folded.append(group)
            else:
                kept.setdefault(reason, []).append(group)
        if folded:
            graph_module.graph.eliminate_dead_code()
            state.note(f"{len(folded)} diagonals became part of the gain before them")
        for reason, groups in kept.items():
            state.note(f"the diagonals of {', '.join(groups)} stay in the program: {reason}")
        return PassResult(graph_module, bool(folded))


def _fold(graph_module: fx.GraphModule, table: fx.Node, products: list[fx.Node]) -> str | None:
    """Folds one table; returns the reason if that is not possible."""
    values = get_tensor(graph_module, str(table.target)).detach()
    if values.shape[0] > 1:
        return "it differs between loops, which share the gain"
    readers: dict[fx.Node, set[fx.Node]] = {}
    for product in products:
        readers.setdefault(product.args[0], set()).add(product)  # type: ignore[arg-type]
    gain = find_gain(graph_module, readers)
    if isinstance(gain, str):
        return gain
    names = [name for name in (gain.weight, gain.bias) if name]
    stored = [get_tensor(graph_module, name).detach() for name in names]
    found = [(tensor * values[0]).to(tensor.dtype) for tensor in stored]
    if not all(_holds(result, tensor, values[0]) for result, tensor in zip(found, stored, strict=True)):
        return f"{stored[0].dtype} does not hold its product with {shown_name(gain.weight)}"
    for name, result in zip(names, found, strict=True):
        _replace_tensor(graph_module, name, result)
    for product in products:
        product.replace_all_uses_with(product.args[0])  # type: ignore[arg-type]
        graph_module.graph.erase_node(product)
    table.meta.pop(LEARN, None)
    return None


def _holds(result: Tensor, stored: Tensor, factor: Tensor) -> bool:
    """Whether `result` is `stored * factor` up to ordinary rounding: nothing overflows or underflows in its type."""
    exact = stored.double() * factor.double()
    near = (result.double() - exact).abs() <= 4 * torch.finfo(result.dtype).eps * exact.abs()
    return bool((near & result.isfinite()).all())


def _products(table: fx.Node) -> list[fx.Node]:
    """The nodes that multiply activations by rows of `table`; weights are multiplied by reciprocals of rows."""
    rows = [user for user in table.users if user.target is _aten.select.int]
    rows += [user for row in rows for user in row.users if user.target is _aten.to.dtype]
    return [user for row in rows for user in row.users if user.target is _aten.mul.Tensor]


@dataclass(frozen=True)
class Gain:
    """Names of a norm's parameters; bias may be empty."""

    weight: str
    bias: str = ""


def find_gain(graph_module: fx.GraphModule, readers: Mapping[fx.Node, Set[fx.Node]]) -> Gain | str:
    """The gain that is applied last in all tensors of `readers`, if a factor per channel can be folded into it.

    Args:
        graph_module: the graph.
        readers: the tensors, and for each the nodes that may read it.

    Returns:
        The gain, or the reason why there is none.
    """
    found: set[Gain] = set()
    for node, allowed in readers.items():
        gain = _gain(node)
        if gain is None:
            return f"{node.target} before it is not a norm with a gain"
        others = [user.name for user in node.users if user not in allowed]
        if others:
            return f"{others[0]} also reads {node.name}"
        found.add(gain)
    if len(found) != 1:
        return f"it reads norms with different gains: {', '.join(sorted(shown_name(gain.weight) for gain in found))}"
    gain = found.pop()
    for name in filter(None, (gain.weight, gain.bias)):
        stored = [n for n in graph_module.graph.nodes if n.op == "get_attr" and n.target == name]
        others = [user.name for node in stored for user in node.users if user not in readers]
        if others:
            return f"{others[0]} also uses {name}"
        if get_tensor(graph_module, name).ndim != 1:
            return f"{name} is not a vector"
    return gain


def _gain(node: fx.Node) -> Gain | None:
    """Gain and bias of `node` if it is a norm over the last dimension, or a product with a stored tensor."""
    inputs = [_stored(argument) for argument in node.args]
    if node.target is _aten.mul.Tensor and sum(map(bool, inputs)) == 1:
        return Gain(max(inputs))
    norm = node.target in (_aten.rms_norm.default, _aten.layer_norm.default)
    if not norm or len(inputs) < 3 or not inputs[2] or len(node.args[1]) != 1:  # type: ignore[arg-type]
        return None
    has_bias = node.target is _aten.layer_norm.default and len(inputs) > 3 and node.args[3] is not None
    if has_bias and not inputs[3]:
        return None  # a computed bias, which cannot be scaled with the gain
    return Gain(inputs[2], inputs[3] if has_bias else "")


def _stored(argument: object) -> str:
    """Name of a stored tensor, "" for anything else."""
    return str(argument.target) if isinstance(argument, fx.Node) and argument.op == "get_attr" else ""


def _replace_tensor(graph_module: fx.GraphModule, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    delattr(graph_module.get_submodule(owner), leaf)
    set_tensor(graph_module, name, tensor)
