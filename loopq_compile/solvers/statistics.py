"""Input statistics for weight solvers: second moments, summed over tokens, batches and loops."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loopq_compile.calibration import distributed

Sample = tuple[Tensor, Tensor | None, Tensor | None]
"""Tokens of one batch: inputs `x̂` `[n, K]`, those of the full-precision graph `[n, K₀]`, and `ρ` `[n, out]`; see
`loopq_compile.solvers.loaq` for the symbols."""


@dataclass
class Moments:
    """Sums over tokens; see `loopq_compile.solvers.loaq` for the symbols.

    Args:
        hessian: `H = Σ x̂ᵀx̂`, `[K, K]`.
        cross: `G = Σ x̂ᵀx` with the inputs `x` of the full-precision graph, `[K, K₀]`; None if not needed.
        residual: `Γ = Σ x̂ᵀρ` with the error `ρ` of the residual stream, `[K, out]`; None if not needed.
        tokens: how many tokens.
    """

    hessian: Tensor
    cross: Tensor | None = None
    residual: Tensor | None = None
    tokens: int = 0

    @staticmethod
    def of(sample: Sample, tokens: slice = slice(None)) -> Moments:
        """Moments of some `tokens` of a sample."""
        x, teacher, residual = (None if part is None else part[tokens] for part in sample)
        assert x is not None
        left = x.t()
        return Moments(
            left @ x,
            None if teacher is None else left @ teacher,
            None if residual is None else left @ residual,
            x.shape[0],
        )

    def add(self, other: Moments, weight: float = 1.0) -> Moments:
        """Adds `weight` times the sums of `other`, in place."""
        for mine, theirs in zip(self._tensors(), other._tensors(), strict=True):
            if mine is not None and theirs is not None:
                mine.add_(theirs, alpha=weight)
        self.tokens += other.tokens
        return self

    def times(self, weight: float) -> Moments:
        """The sums times `weight`, as new tensors."""
        hessian, cross, residual = (None if tensor is None else tensor * weight for tensor in self._tensors())
        assert hessian is not None
        return Moments(hessian, cross, residual, self.tokens)

    def gather(self, owner: int) -> None:
        """Adds the sums of all other processes, in process `owner` only; the sums of the others become useless."""
        tokens = torch.tensor(self.tokens, device=self.hessian.device)
        distributed.sum_at(owner, [tokens, *(tensor for tensor in self._tensors() if tensor is not None)])
        self.tokens = int(tokens)

    def _tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.hessian, self.cross, self.residual


@dataclass
class Split:
    """Moments of tokens to `fit` on, and of tokens `held` back to choose by (None if there are none).

    Loops are summed with `add`: one weight serves all of them, so its error is the sum over loops.
    """

    fit: Moments
    held: Moments | None = None

    @staticmethod
    def of(sample: Sample, held: int) -> Split:
        """Moments of a sample whose last `held` tokens are held back."""
        count = len(sample[0]) - held
        rest = Moments.of(sample, slice(count, None)) if held else None
        return Split(Moments.of(sample, slice(count)), rest)

    def add(self, other: Split, weight: float = 1.0) -> Split:
        """Adds `weight` times the sums of `other`, in place."""
        self.fit.add(other.fit, weight)
        if self.held is not None and other.held is not None:
            self.held.add(other.held, weight)
        elif other.held is not None:
            self.held = other.held.times(weight)
        return self

    def times(self, weight: float) -> Split:
        """The sums times `weight`, as new tensors."""
        return Split(self.fit.times(weight), self.held.times(weight) if self.held else None)

    def gather(self, owner: int, held: bool) -> None:
        """`Moments.gather` of both parts.

        Args:
            owner: the process that gets the sums.
            held: whether some process may have held tokens back; those without add nothing.
        """
        if distributed.world(self.fit.hessian.device)[1] == 1:
            return
        if held and self.held is None:
            self.held = replace(self.fit.times(0.0), tokens=0)
        for moments in filter(None, (self.fit, self.held)):
            moments.gather(owner)
        if self.held is not None and not self.held.tokens:
            self.held = None

    def whole(self) -> Moments:
        """Moments of all tokens, as new tensors."""
        whole = self.fit.times(1.0)
        return whole.add(self.held) if self.held else whole
