"""The loss: the student is compared with the teacher's predictions and its states at the end of every loop.

    L = KL(p || p̂) + λ Σ_t w_t [(1 - a_t) |u_t - h_{t+1}|² + a_t |u_t - h_{T+1}|²] + λ' Σ_t |CTA_t(u_t) - h_{t+1}|²
    a_t = |h_{t+1} - h_{T+1}| / (|h_{t+1} - h_{T+1}| + Σ_{k>=t} |h_{k+1} - u_k| + ε)

(LoopQ section 4.4 and appendix B.4.) Squares are means over features relative to the teacher's mean square, so that λ
means the same for every model; sums over loops are means. A perfect student would have a_t = 1 and be pulled to the
last state, away from the teacher's state of that loop; `final_share` therefore bounds a_t.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loopq_compile.calibration.distributed import mean_of
from loopq_compile.calibration.divergence import Divergence
from loopq_compile.graph.options import CalibrationOptions

FULL_VOCABULARY = 8192
"""Up to a vocabulary of this size, the teacher's whole distribution is kept."""
DEFAULT_TOP_K = 512


@dataclass
class Targets:
    """The teacher's outputs for one batch.

    Args:
        logits: float logits `[..., V]`, or the k largest `[..., k]`; None for models without a vocabulary.
        indices: tokens of the largest logits `[..., k]`, None if all are kept.
        total: log of the sum of exponentials over the vocabulary, `[..., 1]`, at the temperature.
        outputs: for models without a vocabulary, the floating-point results.
        states: the state at the end of each loop, `h_2 .. h_{T+1}`.
        mask: 1 for tokens that count, `[batch, sequence]`; None for all.
    """

    logits: Tensor | None
    indices: Tensor | None
    total: Tensor | None
    outputs: list[Tensor]
    states: list[Tensor]
    mask: Tensor | None = None


def keep_largest(logits: Tensor, options: CalibrationOptions) -> tuple[Tensor, Tensor | None, Tensor]:
    """`(logits, indices, total)` of `Targets` for the teacher's logits `[..., V]`."""
    scaled = logits.float() / options.temperature
    total = scaled.logsumexp(-1, keepdim=True)
    k = options.top_k or (logits.shape[-1] if logits.shape[-1] <= FULL_VOCABULARY else DEFAULT_TOP_K)
    if k >= logits.shape[-1]:
        return scaled, None, total
    values, indices = scaled.topk(k, dim=-1)
    return values, indices.to(torch.int32), total


def divergence(logits: Tensor, targets: Targets, temperature: float) -> Tensor:
    """KL(teacher || student) by token, `[...]`, in nats.

    Tokens outside the teacher's top-k count as one event. This is a lower bound of the full divergence; it is zero only
    if both agree on the k tokens and on the rest as a whole.
    """
    assert targets.logits is not None and targets.total is not None
    rows = [None if x is None else x.flatten(0, -2) for x in (logits, targets.logits, targets.total, targets.indices)]
    return Divergence.apply(*rows, temperature).view(logits.shape[:-1])


def token_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of `values` `[batch, sequence]` (or any shape) over the tokens that count.

    Under `torchrun` the sum is divided by the mean number of tokens per process, so that the average over processes
    equals the result of a single process.
    """
    if mask is None or mask.shape != values.shape:
        return values.mean()
    return (values * mask).sum() / mean_of(mask.sum()).clamp_min(1e-6)


def distance(x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    """`|x - y|²` relative to the mean square of `y`, both taken over the tokens that count."""
    error = (x.float() - y.float()).square().mean(-1)
    size = mean_of(token_mean(y.float().square().mean(-1), mask))
    return token_mean(error, mask) / size.clamp_min(1e-12)


@dataclass
class LossParts:
    """The terms of one step: `total` to differentiate, and each part for people."""

    total: Tensor
    prediction: Tensor
    trajectory: Tensor
    transition: Tensor


class Objective:
    """The loss of one batch; keeps the a_t between their updates.

    Args:
        options: weights of the terms, and temperature.
        loops: number of loop ends that are compared, T; 0 switches the trajectory off.
    """

    def __init__(self, options: CalibrationOptions, loops: int) -> None:
        self.options = options
        self.final_shares = torch.zeros(loops)

    def update_shares(self, states: Sequence[Tensor], targets: Targets) -> None:
        """Sets a_t from the student's `states` `u_1 .. u_T`."""
        with torch.no_grad():
            last = targets.states[-1]
            pairs = zip(states, targets.states, strict=True)
            ahead = mean_of(torch.stack([distance(h, last, targets.mask) for h in targets.states])).sqrt()
            error = mean_of(torch.stack([distance(u, h, targets.mask) for u, h in pairs])).sqrt()
            later = error.flip(0).cumsum(0).flip(0)
            self.final_shares = (ahead / (ahead + later + 1e-6)).clamp_max(self.options.final_share).cpu()

    def __call__(
        self,
        logits: Tensor | None,
        outputs: Sequence[Tensor],
        states: Sequence[Tensor],
        adapted: Sequence[Tensor],
        targets: Targets,
    ) -> LossParts:
        """The loss.

        Args:
            logits: the student's; None without a vocabulary (then `outputs` are compared).
            outputs: its floating-point results.
            states: `u_1 .. u_T`; empty if the trajectory is switched off.
            adapted: `CTA_t(u_t)`, t < T; empty without adapters.
            targets: targets of the same batch.
        """
        options = self.options
        if logits is not None:
            prediction = token_mean(divergence(logits, targets, options.temperature), targets.mask)
        else:
            pairs = zip(outputs, targets.outputs, strict=True)
            prediction = torch.stack([distance(x, y, targets.mask) for x, y in pairs]).mean()
        zero = prediction.new_zeros(())
        trajectory = transition = zero
        if states and options.state_weight:
            last = targets.states[-1]
            terms = [
                (1 - share) * distance(u, h, targets.mask) + share * distance(u, last, targets.mask)
                for u, h, share in zip(states, targets.states, self.final_shares.tolist(), strict=True)
            ]
            trajectory = torch.stack(terms).mean()
        if adapted and options.transition_weight:
            pairs = zip(adapted, targets.states, strict=False)
            transition = torch.stack([distance(x, h, targets.mask) for x, h in pairs]).mean()
        total = prediction + options.state_weight * trajectory + options.transition_weight * transition
        return LossParts(total, prediction.detach(), trajectory.detach(), transition.detach())
