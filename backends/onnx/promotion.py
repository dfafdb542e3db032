"""Casts that PyTorch's operators make themselves and ONNX's do not: `1.5 * arange(n)`, `mask.sum()`, a whole division.

torch.onnx has a pass for this. It computes the shapes of the whole graph once more, a fifth of the time of an export.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, fx

_aten = torch.ops.aten
_CASTS = {_aten._to_copy.default, _aten.to.dtype, _aten.to.dtype_layout, _aten.to.device, _aten.to.other}
_CONDITION: dict[Any, int] = {_aten.where.self: 0, _aten.where.ScalarOther: 0, _aten.where.ScalarSelf: 0}
_CONDITION |= {_aten.masked_fill.Scalar: 1, _aten.masked_fill.Tensor: 1}
"""Operators with a condition, and its place; it stays as it is."""
_JOINS = {_aten.cat.default, _aten.stack.default}
_SUMS = {_aten.sum.default, _aten.sum.dim_IntList, _aten.prod.default, _aten.prod.dim_int}
_SUMS |= {_aten.cumsum.default, _aten.cumprod.default, _aten.mean.default, _aten.mean.dim}


class Writer(Protocol):
    """What adds nodes."""

    def emit(self, target: Any, args: Any, kwargs: Any) -> fx.Node:
        """Adds a node."""


def promoted(writer: Writer, target: Any, args: Any, kwargs: Any, result: Any) -> Any:
    """`args` after casts to the type in which `target` computes `result`."""
    if not isinstance(target, torch._ops.OpOverload) or not isinstance(result, Tensor) or target in _CASTS:
        return args
    pointwise = torch.Tag.pointwise in target.tags or target in _CONDITION
    if not (pointwise or target in _JOINS or (target in _SUMS and "dtype" not in kwargs)):
        return args
    flat = list(args[0]) if target in _JOINS else list(args)
    wanted = _computed_in(flat, result.dtype)
    if wanted is None or wanted.is_complex:
        return args
    flat = [
        value if _CONDITION.get(target) == place else _cast(writer, value, wanted) for place, value in enumerate(flat)
    ]
    return [flat, *args[1:]] if target in _JOINS else flat


def _computed_in(args: list[Any], result: torch.dtype) -> torch.dtype | None:
    """The type of the result; for comparisons, the common type of what they compare."""
    if result is not torch.bool:
        return result
    values = [value.meta["val"] if isinstance(value, fx.Node) else value for value in args]
    known = [value for value in values if isinstance(value, Tensor | bool | int | float)]
    tensors = [value for value in known if isinstance(value, Tensor)]
    if not tensors or any(value.is_complex() for value in tensors):
        return None
    common: Any = tensors[0]
    for value in known:
        kind = torch.result_type(common, value)
        common = tensors[0] if kind is tensors[0].dtype else torch.empty_like(tensors[0], dtype=kind)
    return common.dtype


def _cast(writer: Writer, value: Any, wanted: torch.dtype) -> Any:
    given = value.meta["val"] if isinstance(value, fx.Node) else None
    if isinstance(given, Tensor) and given.dtype is not wanted and not given.is_complex():
        return writer.emit(_aten._to_copy.default, (value,), {"dtype": wanted})
    if isinstance(given, torch.SymInt | torch.SymFloat):
        return writer.emit(_aten.scalar_tensor.default, (value,), {"dtype": wanted})
    return value
