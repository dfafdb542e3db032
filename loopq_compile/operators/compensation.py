"""Low-rank compensation of a quantized linear: `loopq::compensate`."""

from __future__ import annotations

import torch
from torch import Tensor

from loopq_compile.operators.precision import all_wide, in_own_types


def _definition(y: Tensor, x: Tensor, coefficients: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return y + torch.matmul(torch.matmul(x, down) * coefficients, up.t())


@torch.library.custom_op("loopq::compensate", mutates_args=())
def compensate(y: Tensor, x: Tensor, coefficients: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """`y + (x down) diag(coefficients) upᵀ`, where `y` is a quantized linear's output for `x`.

    Args:
        y: `[..., N]`; x: `[..., K]`.
        coefficients: `[r]`, a row of a per-loop table.
        down: `[K, r]`; up: `[N, r]`; shared by all loops.

    Returns:
        `[..., N]` in the type of `y`; arithmetic in single precision at least.
    """
    with in_own_types(y):
        return _definition(*all_wide(y, x, coefficients, down, up)).to(y.dtype)


@compensate.register_fake
def _(y: Tensor, x: Tensor, coefficients: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return y.new_empty(y.shape)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])
    ctx.kept = inputs[0].dtype  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # type: ignore[attr-defined]
    with torch.enable_grad():
        wide = [tensor.detach().requires_grad_() for tensor in all_wide(*saved)]
        x, coefficients, down, up = wide
        result = torch.matmul(torch.matmul(x, down) * coefficients, up.t())
    gradients = torch.autograd.grad(result, wide, grad.to(result.dtype))
    own = [gradient.to(tensor.dtype) for gradient, tensor in zip(gradients, saved, strict=True)]
    return (grad.to(ctx.kept), *own)  # type: ignore[attr-defined]


compensate.register_autograd(_backward, setup_context=_save)
