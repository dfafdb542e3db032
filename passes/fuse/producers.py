"""What can come before a transform or a quantization in the same kernel: an activation function or a norm.

Models write both as one operator or spell them out, as in Hugging Face's RMS norm and GPT-2's GELU. Spelled-out forms
are trees of operators (`_RMS`, `_NEW_GELU`). They are matched in both orders of sums and products, and through casts;
`norm` tells where a model in half precision rounds (`loopq_compile.operators.packed.NORMS`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

_aten = torch.ops.aten
_CASTS = (_aten.to.dtype, _aten._to_copy.default, _aten.type_as.default)
_COMMUTATIVE = (_aten.mul.Tensor, _aten.add.Tensor)
_SIMPLE: dict[Any, str] = {_aten.silu.default: "silu", _aten.relu.default: "relu"}

_X, _EPS = "x", "eps"
_RMS = (
    _aten.mul.Tensor,
    _X,
    (_aten.rsqrt.default, (_aten.add.Tensor, (_aten.mean.dim, (_aten.pow.Tensor_Scalar, _X, 2), [-1], True), _EPS)),
)
_CUBE = (_aten.add.Tensor, _X, (_aten.mul.Tensor, (_aten.pow.Tensor_Scalar, _X, 3), 0.044715))
_TANH = (_aten.tanh.default, (_aten.mul.Tensor, _CUBE, math.sqrt(2 / math.pi)))
_NEW_GELU = (_aten.mul.Tensor, (_aten.mul.Tensor, _X, 0.5), (_aten.add.Tensor, _TANH, 1))


@dataclass
class Front:
    """Nodes that compute an activation function or a norm of `x`, as arguments of `loopq::quantize_packed`.

    Args:
        x: the tensor that they read.
        part: name for reports, such as "swiglu".
        nodes: the nodes that a kernel takes over.
    """

    x: fx.Node
    part: str
    nodes: set[fx.Node]
    up: fx.Node | None = None
    activation: str = ""
    norm: str = ""
    gain: fx.Node | None = None
    shift: fx.Node | None = None
    eps: float = 0.0


def match_front(node: fx.Node) -> Front | None:
    """The activation function or norm whose result `node` is; None if there is none."""
    return _norm(node) or _spelled_norm(node) or _gated(node) or _activation(node)


def _norm(node: fx.Node) -> Front | None:
    """`aten.rms_norm` and `aten.layer_norm` over the last dimension."""
    width = _value(node).shape[-1] if isinstance(_value(node), Tensor) else None
    if node.target is _aten.rms_norm.default and list(node.args[1]) == [width]:  # type: ignore[arg-type]
        x, _, gain, eps = (*node.args, None, None)[:4]
        smallest = torch.finfo(torch.float32).eps if eps is None else eps
        return Front(x, "rms_norm", {node}, norm="rms", gain=gain, eps=smallest)  # type: ignore[arg-type]
    if node.target is _aten.layer_norm.default and list(node.args[1]) == [width]:  # type: ignore[arg-type]
        x, _, gain, shift, eps = (*node.args, *(None, None, 1e-5)[len(node.args) - 2 :])[:5]
        return Front(x, "layer_norm", {node}, norm="layer", gain=gain, shift=shift, eps=eps)  # type: ignore[arg-type]
    return None


def _spelled_norm(node: fx.Node) -> Front | None:
    """`gain * (x * rsqrt(mean(x ** 2) + eps))`, with casts around the core and around `x`."""
    outer, nodes = _behind_casts(node)
    for core, gain in ((outer, None), *_with_gain(outer)):
        inner, casts = _behind_casts(core) if gain is not None else (core, set())
        found = _Bound()
        if not _matches(_RMS, inner, found) or not isinstance(found.values[_EPS], int | float):
            continue
        nodes = nodes | casts | found.nodes | ({outer} if gain is not None else set())
        # A cast without effect is the residual stream of a float32 model, which other nodes read, too.
        x, after = found.values[_X], _value(node).dtype
        x, more = (x, set()) if _value(x).dtype == after else _behind_casts(x)
        before = _value(x).dtype
        half = before != torch.float32
        rounded = half and gain is not None and _value(core).dtype == before
        mixed = rounded and gain is not None and _value(gain).dtype != before
        if _value(inner).dtype != torch.float32 or before != after or mixed:
            return None
        kind = "rms_rounded" if rounded else "rms"
        return Front(x, "rms_norm", nodes | more, norm=kind, gain=gain, eps=float(found.values[_EPS]))
    return None


def _with_gain(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Yields `(tensor, gain)` of a product in both orders; `gain` has one entry per feature."""
    if node.target is _aten.mul.Tensor:
        for core, gain in (node.args, node.args[::-1]):
            if not isinstance(core, fx.Node) or not isinstance(gain, fx.Node) or not isinstance(_value(gain), Tensor):
                continue
            if tuple(_value(gain).shape) == tuple(_value(node).shape[-1:]):
                yield core, gain


def _gated(node: fx.Node) -> Front | None:
    """`activation(gate) * up`."""
    if node.target is _aten.mul.Tensor:
        for gate, up in (node.args, node.args[::-1]):
            found = _activation(gate) if isinstance(gate, fx.Node) and isinstance(up, fx.Node) else None
            if found is not None and _same_type(found.x, up) and up not in found.nodes:
                part = "swiglu" if found.activation == "silu" else f"gated {found.part}"
                return Front(found.x, part, found.nodes | {node}, up=up, activation=found.activation)  # type: ignore[arg-type]
    return None


def _activation(node: fx.Node) -> Front | None:
    name = _SIMPLE.get(node.target)
    if node.target is _aten.gelu.default:
        name = "gelu_tanh" if node.kwargs.get("approximate", "none") == "tanh" else "gelu"
    if name is not None:
        return Front(node.args[0], name, {node}, activation=name)  # type: ignore[arg-type]
    found = _Bound()
    if _matches(_NEW_GELU, node, found) and _same_type(found.values[_X], node):
        return Front(found.values[_X], "gelu_tanh", found.nodes, activation="gelu_tanh")
    return None


@dataclass
class _Bound:
    """What the names of a pattern matched, and the nodes inside."""

    values: dict[str, Any] = field(default_factory=dict)
    nodes: set[fx.Node] = field(default_factory=set)


def _matches(pattern: Any, value: Any, found: _Bound) -> bool:
    """Whether `value` is `pattern`: a name, a number, a list, or an operator with its arguments. Fills `found`."""
    if isinstance(pattern, str):
        return found.values.setdefault(pattern, value) is value
    if not isinstance(pattern, tuple):
        if isinstance(pattern, float) and isinstance(value, float):
            return math.isclose(pattern, value, rel_tol=1e-6)
        return pattern == value
    target, *wanted = pattern
    if not isinstance(value, fx.Node) or value.target is not target or value.kwargs or len(value.args) != len(wanted):
        return False
    found.nodes.add(value)
    orders = [value.args, value.args[::-1]] if target in _COMMUTATIVE else [value.args]
    for arguments in orders:
        attempt = _Bound(dict(found.values), set(found.nodes))
        if all(_matches(part, argument, attempt) for part, argument in zip(wanted, arguments, strict=True)):
            found.values, found.nodes = attempt.values, attempt.nodes
            return True
    return False


def _behind_casts(node: fx.Node) -> tuple[fx.Node, set[fx.Node]]:
    """The node before all casts that end in `node`, and the casts."""
    casts = set()
    while node.target in _CASTS and isinstance(node.args[0], fx.Node):
        casts.add(node)
        node = node.args[0]
    return node, casts


def _same_type(one: fx.Node, other: Any) -> bool:
    a, b = _value(one), _value(other)
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype


def _value(node: fx.Node) -> Any:
    return node.meta.get("val")
