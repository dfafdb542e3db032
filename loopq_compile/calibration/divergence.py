"""KL divergence between teacher and student over a large vocabulary, with few tensors of that size.

All tokens outside the teacher's k largest logits (`K`) count as one event. With `P = Σ_K p`, `r_p = 1 - P`,
`r_q = 1 - Σ_K q`, and z the student's logits,

    KL = Σ_K p (log p - log q) + r_p (log r_p - log r_q)
    d KL / d z_j = q_j (P - r (1 - r_q)) + [j in K] (r q_j - p_j),     r = r_p / r_q

If K is the whole vocabulary, the gradient is `q - p`. Autograd would keep and traverse half a dozen tensors of the
logits' size: a quarter of a calibration step for a vocabulary of 49,152 (measured).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loopq_compile.operators.fusion import fused

LEAST_REST = 1e-6
"""Lower bound of the probability outside the teacher's k tokens."""


@fused
def _log_total(logits: Tensor, temperature: float) -> Tensor:
    return (logits.float() / temperature).logsumexp(-1, keepdim=True)


@fused
def _gradient(logits: Tensor, total: Tensor, factor: Tensor, temperature: float) -> Tensor:
    return ((logits.float() / temperature - total).exp() * factor).to(logits.dtype)


class Divergence(torch.autograd.Function):
    """`Divergence.apply(logits, target, target_total, indices, temperature)`: KL(teacher || student) by token, `[n]`.

    Args of `apply`:
        logits: the student's, `[n, V]`.
        target: the teacher's largest logits, divided by the temperature, `[n, k]`.
        target_total: log of the sum of exponentials of all of them, `[n, 1]`.
        indices: tokens of `target`, `[n, k]`; None if they are the whole vocabulary in order.
        temperature: of both.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, target_total: Tensor, indices: Tensor | None, temperature: float
    ) -> Tensor:
        total = _log_total(logits, temperature)
        index = None if indices is None else indices.long()
        chosen = logits if index is None else logits.gather(-1, index)
        log_p, log_q = target - target_total, chosen.float() / temperature - total
        p = log_p.exp()
        loss = (p * (log_p - log_q)).sum(-1)
        ctx.temperature, ctx.index, ctx.ratio = temperature, index, None
        if index is not None:
            rest_p = (1 - p.sum(-1)).clamp_min(LEAST_REST)
            left = 1 - log_q.exp().sum(-1)
            rest_q = left.clamp_min(LEAST_REST)
            loss = loss + rest_p * (rest_p.log() - rest_q.log())
            ctx.ratio = torch.where(left > LEAST_REST, rest_p / rest_q, 0.0).unsqueeze(-1)
        ctx.save_for_backward(logits, total, p, log_q)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        logits, total, p, log_q = ctx.saved_tensors
        scale = grad.unsqueeze(-1) / ctx.temperature
        if ctx.index is None:
            return _gradient(logits, total, scale * p.sum(-1, keepdim=True), ctx.temperature).sub_(
                (scale * p).to(logits.dtype)
            ), *[None] * 4
        q = log_q.exp()
        factor = p.sum(-1, keepdim=True) - ctx.ratio * q.sum(-1, keepdim=True)
        result = _gradient(logits, total, scale * factor, ctx.temperature)
        exact = scale * (q * factor + ctx.ratio * q - p)
        return result.scatter_(-1, ctx.index, exact.to(logits.dtype)), *[None] * 4
