"""Invertible transforms before quantization: `loopq::kronecker`."""

from __future__ import annotations

import torch
from torch import Tensor

from loopq_compile.operators.precision import all_wide, in_own_types


@torch.library.custom_op("loopq::kronecker", mutates_args=())
def kronecker(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`x (left ⊗ right)` without forming the product: `leftᵀ X right` on `x` reshaped to `[d1, d2]` (LoopQ eq. 2, 3).

    Args:
        x: `[..., d1 * d2]`, floating point.
        left: `[d1, d1]`.
        right: `[d2, d2]`. With `d2 = 1` and `right = [[1]]` the transform is the full matrix `left`.

    Returns:
        `[..., d1 * d2]` in the type of `x`; arithmetic in single precision at least.
    """
    with in_own_types(x):
        return _apply(*all_wide(x, left, right)).to(x.dtype)


def _apply(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    d1, d2 = left.shape[0], right.shape[0]
    rows = x.reshape(-1, d1, d2)
    if d2 == 1:
        return ((rows.squeeze(-1) @ left) * right[0, 0]).reshape(x.shape)
    # [n * d1, d2] @ right is one product; the one with `left` runs along the middle dimension.
    rows = (rows.reshape(-1, d2) @ right).view(-1, d1, d2)
    return torch.matmul(left.t(), rows).reshape(x.shape)


@kronecker.register_fake
def _(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(
    ctx: torch.autograd.function.FunctionCtx, grad: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    saved = ctx.saved_tensors  # type: ignore[attr-defined]
    x, left, right = all_wide(*saved)
    d1, d2 = left.shape[0], right.shape[0]
    wide_grad = grad.to(x.dtype)
    rows, grads = x.reshape(-1, d1, d2), wide_grad.reshape(-1, d1, d2)
    grad_x = grad_left = grad_right = None
    if ctx.needs_input_grad[2]:  # type: ignore[attr-defined]
        moved = torch.matmul(left, grads)  # both gradients below read it
        grad_right = _sum_of_products(rows, moved).to(saved[2].dtype)
        if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
            grad_x = (moved.view(-1, d2) @ right.t()).view(x.shape).to(saved[0].dtype)
    elif ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
        grad_x = _apply(wide_grad, left.t().contiguous(), right.t().contiguous()).to(saved[0].dtype)
    if ctx.needs_input_grad[1]:  # type: ignore[attr-defined]
        inner = (rows.reshape(-1, d2) @ right).view(-1, d1, d2)
        if d1 <= 2 * d2:  # one small product for each row is faster than to move the middle dimension
            grad_left = torch.bmm(inner, grads.transpose(1, 2)).sum(0)
        else:
            grad_left = _sum_of_products(inner.transpose(1, 2), grads.transpose(1, 2))
        grad_left = grad_left.to(saved[1].dtype)
    return grad_x, grad_left, grad_right


def _sum_of_products(x: Tensor, y: Tensor) -> Tensor:
    """`Σ_n x_nᵀ y_n` of `[n, k, i]` and `[n, k, j]`: `[i, j]`."""
    return x.reshape(-1, x.shape[-1]).t() @ y.reshape(-1, y.shape[-1])


kronecker.register_autograd(_backward, setup_context=_save)
