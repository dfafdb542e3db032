"""The curvature of the output error in one weight: the damped Hessian, its inverse, and its triangular factor.

With inputs `X` `[n, K]`, the error `‖X (Q - W)ᵀ‖²` of a weight `W` `[out, K]` is a quadratic form with Hessian
`H = XᵀX` in every row. It is damped by `Λ`, with `Λ_jj = damping H_jj`. With `r = sqrt(diag H)`,

    H + Λ = diag(r) (R + damping I) diag(r),      R_ij = H_ij / (r_i r_j), the matrix of correlations.

GPTQ as published damps with a multiple of the mean of the diagonal. One input that is a thousand times larger than the
others (the massive activations of every Llama) then decides the damping of all, and the result is rounding to nearest.
The form here does not depend on the scale of inputs, and `R + damping I` is well conditioned in single precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loopq_compile.errors import LoopQError

_ATTEMPTS = 4


class Curvature:
    """`H + Λ` in the order in which columns are rounded.

    Args:
        hessian: `[K, K]`, symmetric. Rows of zeros (inputs that were never active) are decoupled from all others.
        damping: see above; raised tenfold, up to three times, if the factorization fails.
        act_order: whether to order columns by falling `diag H` instead of keeping their order.
        where: the site, for errors.

    Raises:
        LoopQError: the Hessian has NaN or infinite entries, or cannot be factorized.
    """

    def __init__(self, hessian: Tensor, damping: float, act_order: bool = False, where: str = "weight") -> None:
        if not torch.isfinite(hessian).all():
            raise LoopQError(f"The statistics of the inputs of {where} became infinite or NaN on the calibration data.")
        diagonal = hessian.diagonal()
        self._roots = torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal)).sqrt()
        correlations = hessian / self._roots.unsqueeze(1) / self._roots
        correlations.fill_diagonal_(1.0)
        places = torch.arange(len(diagonal), device=diagonal.device)
        self.order = diagonal.argsort(descending=True, stable=True) if act_order else places
        self._lower = self._factorize(correlations, damping, where)
        self.matrix = correlations.fill_diagonal_(1.0 + self.damping) * self._roots.unsqueeze(1) * self._roots

    def _factorize(self, correlations: Tensor, damping: float, where: str) -> Tensor:
        """`L` with `L Lᵀ` the damped correlations, columns in reverse order (see `feedback`)."""
        backwards = self.order.flip(0)
        matrix = correlations[backwards][:, backwards]
        for attempt in range(_ATTEMPTS):
            self.damping = damping * 10**attempt
            lower, failed = torch.linalg.cholesky_ex(matrix.fill_diagonal_(1.0 + self.damping))
            if not failed and torch.isfinite(lower).all():
                return lower
        raise LoopQError(
            f"The Hessian of {where} is singular (damping={self.damping:g} is not enough). Calibrate with more tokens "
            "or raise damping."
        )

    def feedback(self) -> Tensor:
        """`F` `[K, K]`, unit upper triangular, rows and columns in `order`.

        After column `j` has been rounded with error `e_j = w_j - q_j`, the best change of the rest of the row is
        `-e_j F_jk`, k > j. With `(H + Λ)⁻¹ = UᵀU`, U upper triangular, it is `F_jk = U_jk / U_jj` (Frantar et al. 2022,
        GPTQ). One factorization gives U: of the matrix in reverse order, `P (H + Λ) P = L Lᵀ`, so `U = P L⁻¹ P`.
        """
        eye = torch.eye(len(self._lower), dtype=self._lower.dtype, device=self._lower.device)
        upper = torch.linalg.solve_triangular(self._lower, eye, upper=False).flip(0, 1)
        roots = self._roots[self.order]
        return upper / upper.diagonal().unsqueeze(1) * roots.unsqueeze(1) / roots

    def solve(self, right: Tensor) -> Tensor:
        """`(H + Λ)⁻¹ right` for `right` `[K, n]`."""
        backwards = self.order.flip(0)
        roots = self._roots[backwards].unsqueeze(1)
        solution = torch.empty_like(right)
        solution[backwards] = torch.cholesky_solve(right[backwards] / roots, self._lower) / roots
        return solution

    def error(self, difference: Tensor) -> float:
        """`tr(D (H + Λ) Dᵀ)` of a `difference` of weights `[out, K]`: the squared output error that it causes."""
        return float(((difference @ self.matrix) * difference).sum(dtype=torch.float64))
