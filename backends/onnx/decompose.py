"""Operators that torch.onnx or operator set 21 does not know, written with operators that they know: some of language
models, and from this package transforms, transition adapters and integers in caches.

torch.onnx can do this itself, but traces the whole graph two more times; that doubled the time of an export.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from loopq_compile.operators.adapter import EPSILON
from loopq_compile.operators.cache import dequantize_cache_definition, quantize_cache_definition

_aten, _loopq = torch.ops.aten, torch.ops.loopq


def _rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    half = x.dtype in (torch.float16, torch.bfloat16)
    wide = _cast(x, torch.float32) if half else x
    smallest = torch.finfo(wide.dtype).eps if eps is None else eps
    square = wide.pow(2).mean(list(range(-len(shape), 0)), keepdim=True)
    result = wide * torch.rsqrt(square + smallest)
    result = result if weight is None else result * weight
    return _cast(result, x.dtype) if half else result


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return _aten._to_copy.default(x, dtype=dtype)  # Tensor.to is an operator that torch.onnx wants decomposed


def _to(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Every form of `Tensor.to`: in a file there is a type, but no device and no layout."""
    dtype = x.dtype
    for value in (*args, *kwargs.values()):
        dtype = value if isinstance(value, torch.dtype) else value.dtype if isinstance(value, Tensor) else dtype
    return x if dtype is x.dtype else _cast(x, dtype)


def _diff(x: Tensor, n: int = 1, dim: int = -1, prepend: Tensor | None = None, append: Tensor | None = None) -> Tensor:
    parts = [part for part in (prepend, x, append) if part is not None]
    x = torch.cat(parts, dim) if len(parts) > 1 else x
    for _ in range(n):
        later, earlier = _aten.slice.Tensor(x, dim, 1, sys.maxsize), _aten.slice.Tensor(x, dim, 0, -1)
        x = later.logical_xor(earlier) if x.dtype is torch.bool else later - earlier
    return x


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *rest: Any, **kwargs: Any) -> Any:
    """torch.onnx takes `[batch, heads, sequence, size]` only; one head may have no axis, and more axes are batches."""
    sizes = query.shape[:-2]
    if len(sizes) == 2:
        return _aten.scaled_dot_product_attention.default(query, key, value, mask, *rest, **kwargs)
    if mask is not None and mask.ndim > 2:
        mask = mask.expand(*sizes, *mask.shape[-2:]).flatten(0, -3)[:, None]
    flat = [x.flatten(0, -3)[:, None] if x.ndim > 2 else x[None, None] for x in (query, key, value)]
    result = _aten.scaled_dot_product_attention.default(*flat, mask, *rest, **kwargs)
    return result.reshape(*sizes, *result.shape[-2:])


def _kronecker(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    if 1 in (len(left), len(right)):
        return torch.matmul(x, left * right)
    rows = x.reshape([*x.shape[:-1], len(left), len(right)])
    return torch.matmul(left.t(), torch.matmul(rows, right)).reshape(x.shape)


def _transition_adapter(
    u: Tensor, gate: Tensor, gain: Tensor, shift: Tensor, mix: Tensor, down: Tensor, up: Tensor
) -> Tensor:
    normed = u * torch.rsqrt(u.pow(2).mean([-1], keepdim=True) + EPSILON)
    low_rank = torch.matmul(torch.matmul(normed, down) * mix, up.t())
    return u + gate * (gain * normed + shift + low_rank)


def _compensate(y: Tensor, x: Tensor, coefficients: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return y + torch.matmul(torch.matmul(x, down) * coefficients, up.t())


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    _aten.rms_norm.default: _rms_norm,
    _aten.diff.default: _diff,
    _aten.scaled_dot_product_attention.default: _attention,
    _aten.square.default: lambda x: x * x,
    _aten.view.default: torch.reshape,  # spelled-out attention gives another memory layout than the operator did
    _loopq.kronecker.default: _kronecker,
    _loopq.transition_adapter.default: _transition_adapter,
    _loopq.compensate.default: _compensate,
    _loopq.quantize_cache.default: quantize_cache_definition,
    _loopq.dequantize_cache.default: dequantize_cache_definition,
    **{operator: _to for operator in (_aten.to.dtype, _aten.to.device, _aten.to.dtype_layout, _aten.to.other)},
    _aten.__and__.Tensor: torch.bitwise_and,
    _aten.__or__.Tensor: torch.bitwise_or,
    _aten.__xor__.Tensor: torch.bitwise_xor,
}
"""Decompositions by operator; each takes the operator's own arguments."""
