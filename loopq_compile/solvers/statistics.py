"""What a weight solver needs to know about inputs: second moments, summed over tokens, batches and loops."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


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
    def of(x: Tensor, teacher: Tensor | None = None, residual: Tensor | None = None) -> Moments:
        """Moments of inputs `x` `[n, K]`, with those of the full-precision graph `[n, K₀]`, and `ρ` `[n, out]`."""
        return Moments(
            x.t() @ x,
            None if teacher is None else x.t() @ teacher,
            None if residual is None else x.t() @ residual,
            x.shape[0],
        )

    def add(self, other: Moments, weight: float = 1.0) -> Moments:
        """Adds `weight` times the sums of `other`, in place."""
        self.hessian.add_(other.hessian, alpha=weight)
        for mine, theirs in ((self.cross, other.cross), (self.residual, other.residual)):
            if mine is not None and theirs is not None:
                mine.add_(theirs, alpha=weight)
        self.tokens += other.tokens
        return self

    def plus(self, other: Moments | None) -> Moments:
        """Moments of both together, as new tensors."""
        mine = Moments(*(None if t is None else t.clone() for t in (self.hessian, self.cross, self.residual)), self.tokens)  # type: ignore[arg-type]
        return mine if other is None else mine.add(other)


@dataclass
class Split:
    """Moments of tokens to fit on, and of tokens held back to choose by. None: no such tokens."""

    fit: Moments | None = None
    held: Moments | None = None

    def add(self, sample: Sequence[Tensor | None], held: int) -> None:
        """Adds a sample (arguments of `Moments.of`), its last `held` tokens to those held back."""
        count = len(sample[0]) - held  # type: ignore[arg-type]
        self._include(Split(Moments.of(*(_part(tensor, slice(count)) for tensor in sample))))  # type: ignore[arg-type]
        if held:
            rest = (_part(tensor, slice(count, None)) for tensor in sample)
            self._include(Split(None, Moments.of(*rest)))  # type: ignore[arg-type]

    def include(self, other: Split, weight: float = 1.0) -> Split:
        """Adds `weight` times the moments of another call of the same weight, in place."""
        ...
