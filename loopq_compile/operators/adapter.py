"""The cross-loop transition adapter (LoopQ section 4.3): `loopq::transition_adapter`."""

from __future__ import annotations

import torch
from torch import Tensor

from loopq_compile.operators.precision import all_wide, in_own_types

EPSILON = 1e-6
"""Added to the mean square before the root."""


def _definition(u: Tensor, gate: Tensor, gain: Tensor, shift: Tensor, mix: Tensor, down: Tensor, up: Tensor) -> Tensor:
    normed = u * torch.rsqrt(u.square().mean(-1, keepdim=True) + EPSILON)
    return u + gate * (gain * normed + shift + (normed @ down * mix) @ up.t())


@torch.library.custom_op("loopq::transition_adapter", mutates_args=())
def transition_adapter(
    u: Tensor, gate: Tensor, gain: Tensor, shift: Tensor, mix: Tensor, down: Tensor, up: Tensor
) -> Tensor:
    """`u + gate (gain ⊙ N(u) + shift + (N(u) down) diag(mix) upᵀ)`, `N` the RMS normalization (LoopQ eq. 7).

    Args:
        u: the loop's output, `[..., d]`.
        gate: `[1]`; gain, shift: `[d]`; mix: `[r]`. Rows of per-loop tables.
        down, up: `[d, r]`, shared by all loops.

    Returns:
        The state that the next loop reads, `[..., d]` in the type of `u`; arithmetic in single precision at least.
    """
    with in_own_types(u):
        return _definition(*all_wide(u, gate, gain, shift, mix, down, up)).to(u.dtype)


@transition_adapter.register_fake
def _(u: Tensor, gate: Tensor, gain: Tensor, shift: Tensor, mix: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return u.new_empty(u.shape)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # type: ignore[attr-defined]
    with torch.enable_grad():
        wide = [tensor.detach().requires_grad_() for tensor in all_wide(*saved)]
        result = _definition(*wide)
    gradients = torch.autograd.grad(result, wide, grad.to(result.dtype))
    return tuple(gradient.to(tensor.dtype) for gradient, tensor in zip(gradients, saved, strict=True))


transition_adapter.register_autograd(_backward, setup_context=_save)
