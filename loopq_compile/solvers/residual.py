"""Finds which linears write to the residual stream, from the structure of the graph."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

_aten = torch.ops.aten
_MOVES = {
    *(_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default, _aten.flatten.using_ints),
    *(_aten.unsqueeze.default, _aten.squeeze.dim, _aten.clone.default, _aten.contiguous.default),
    *(_aten.alias.default, _aten.detach.default, _aten.dropout.default, _aten._to_copy.default, _aten.to.dtype),
}
"""Operators that do not change the numbers of a token."""
_PRODUCTS = {
    _aten.linear.default, _aten.mm.default, _aten.matmul.default, _aten.addmm.default, _aten.bmm.default,
    _aten.scaled_dot_product_attention.default,
}  # fmt: skip
LARGEST_BRANCH = 16
"""Most nodes between a linear and the addition; a norm takes at most eight."""


@dataclass(frozen=True)
class Write:
    """A linear's path into the residual stream.

    Args:
        linear: the linear.
        add: the addition of its branch to the stream.
        stream: the other operand, computed before the linear.
        branch: the nodes in between, in graph order; empty if the linear's output is added unchanged.
    """

    linear: fx.Node
    add: fx.Node
    stream: fx.Node
    branch: tuple[fx.Node, ...]


def find_write(linear: fx.Node) -> Write | None:
    """The addition into which all of `linear`'s output goes, without another product in between, if the other operand
    is the residual stream: it is also read elsewhere (by the norm before the sub-layer), and is computed before the
    linear.

    Use it on a graph before quantization, where only the model's own nodes read a stream.
    """
    inside = {linear}
    branch: list[fx.Node] = []
    node = linear.next
    while node.op != "root" and len(branch) <= LARGEST_BRANCH:
        reads = [argument for argument in node.all_input_nodes if argument in inside]
        if reads:
            others = [a for a in node.all_input_nodes if a not in inside and a.op != "get_attr"]
            if node.target is _aten.add.Tensor and len(others) == 1 and not node.kwargs:
                leaves = all(user in inside or user is node for member in inside for user in member.users)
                known = len(others[0].users) > 1 and others[0] < linear
                return Write(linear, node, others[0], tuple(branch)) if leaves and known else None
            if node.op == "output" or node.target in _PRODUCTS or any(_is_tensor(other) for other in others):
                return None
            inside.add(node)
            branch.append(node)
        node = node.next
    return None


def _is_tensor(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return value is None or isinstance(value, Tensor)


def has_norm(write: Write) -> bool:
    """Whether the branch changes the numbers."""
    return any(node.target not in _MOVES for node in write.branch)


def norm_gain(output: Tensor, normed: Tensor, tolerance: float = 0.02) -> Tensor | None:
    """The gain `γ` `[out]` of the root-mean-square norm that turns `output` into `normed` `[n, out]`; None if none
    does.

    The norm is recognized by its numbers, so the operators do not matter. With `u = output / rms(output)`, the gain is
    the least squares solution of `normed = γ u`. It must explain `normed` up to the relative `tolerance`.
    """
    unit = output * inverse_rms(output)
    gain = (normed * unit).sum(0) / unit.square().sum(0).clamp_min(1e-30)
    left = (normed - gain * unit).square().sum() / normed.square().sum().clamp_min(1e-30)
    return gain if float(left) < tolerance**2 else None


def inverse_rms(x: Tensor) -> Tensor:
    """`D`, one over the root mean square of every token, `[n, 1]`."""
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-12)
