"""LoaQ: the target of rounding is the output of the full-precision model, not the weight (arXiv 2509.06297).

A looped model uses one weight `W` in `T` loops. Let `X̂_t` `[n, K]` be the input of the linear and `R̂_t` `[n, out]`
the residual stream to which its output is added, in loop `t` of the quantized graph; `X_t` and `R_t` are those of the
full-precision graph.

**Form 1, output of the linear.** `Σ_t w_t ‖X̂_t Qᵀ - X_t Wᵀ‖²` is a quadratic function of Q for any number of
loops. With `H = Σ_t w_t X̂_tᵀX̂_t` and `G = Σ_t w_t X̂_tᵀX_t` it equals

    tr((Q - W*) H (Q - W*)ᵀ) + constant,      W*ᵀ = H⁻¹ G Wᵀ = Wᵀ + H⁻¹ (G - H) Wᵀ,

so that one weight for all loops needs only sums: loops with larger errors or larger activations count in proportion.
The constant holds what no single weight can achieve for T loops. The inverse is damped in the second, residual form
(`C = G - H`): without an error of the inputs nothing changes, however strong the damping. A fraction α of the
correction is applied.

**Form 2, output of the sub-layer**, for a linear that writes to the residual stream: `Σ_t ‖(R̂_t + X̂_t Qᵀ) - (R_t +
X_t Wᵀ)‖²` adds `H⁻¹ Γ`, `Γ = Σ_t w_t X̂_tᵀ ρ_t`, `ρ_t = R_t - R̂_t`, of which a fraction β is applied.

**Form 3, after a norm.** A root-mean-square norm divides a token by `1 / D`. If the norm follows the addition,
`‖D̂ (R̂ + X̂ Qᵀ) - D (R + X Wᵀ)‖²` with frozen factors is form 1 of the scaled inputs `D̂ X̂`, `D X` with `ρ = D R - D̂
R̂`: the norm's gain scales output columns, which are solved separately, and cancels.

**Sandwich norms** (linear, norm with gain `γ`, addition; Ouro): column `j` of the output is `R̂_j + γ_j D̂ X̂ q_j`,
with `D` the norm's factor for the linear's own output, and

    Σ_t ‖R̂_j + γ_j D̂ X̂ q_j - R_j - γ_j D X w_j‖² = γ_j² Σ_t ‖D̂ X̂ q_j - D X w_j - ρ_j / γ_j‖².

So `ρ` is divided by the gain, which does *not* cancel there. A norm without effect (`γ_j = 0`) cannot correct anything,
so `ρ_j γ_j / (γ_j² + ε)` replaces the quotient. `D̂` is frozen at the unrounded weight on quantized inputs: rounding
hardly changes the length of an output of many features.

With transforms the quantized graph reads `X̂ = quantized(X̂' P)` and the weight is `W P⁻ᵀ` `[out, K]`; `X` and the
weight of `G Wᵀ` are those of the full-precision graph, which needs no transform: `X Wᵀ` is the output either way.

α and β are chosen on a grid by the error of the unrounded `W*` on tokens that were held back when `W*` was computed.
With moments of those tokens, the error is a quadratic polynomial in α and β and is free to evaluate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loopq_compile.solvers.curvature import Curvature
from loopq_compile.solvers.statistics import Moments


@dataclass(frozen=True)
class Corrections:
    """Directions in which a weight can move, each `[out, K]`: towards the outputs and towards the residual stream."""

    output: Tensor
    residual: Tensor | None

    def applied(self, weight: Tensor, alpha: float, beta: float) -> Tensor:
        """`W + α output + β residual`."""
        target = weight + alpha * self.output
        return target if self.residual is None or not beta else target.add_(self.residual, alpha=beta)


def corrections(moments: Moments, curvature: Curvature, weight: Tensor, original: Tensor) -> Corrections:
    """The corrections of a weight.

    Args:
        moments: moments with `cross`, and with `residual` for forms that use the residual stream.
        curvature: curvature of `moments.hessian`.
        weight: what the quantized graph rounds, `[out, K]`.
        original: the weight of the full-precision graph, `[out, K₀]`.
    """
    assert moments.cross is not None
    missing = moments.cross @ original.t() - moments.hessian @ weight.t()
    residual = None if moments.residual is None else curvature.solve(moments.residual).t()
    return Corrections(curvature.solve(missing).t(), residual)


def choose(
    found: Corrections, held: Moments, weight: Tensor, original: Tensor, alphas: Tensor, betas: Tensor
) -> tuple[float, float]:
    """α and β from `alphas` and `betas` with the least error on `held` tokens; in a tie, the smaller ones.

    With `E = X̂ Wᵀ - target` the error of the unchanged weight and directions `A`, `B`, the error is `‖E + α X̂ Aᵀ + β
    X̂ Bᵀ‖²`.
    """
    assert held.cross is not None
    slope = held.cross @ original.t() - held.hessian @ weight.t()
    if held.residual is not None:
        slope = slope + held.residual
    directions = [found.output, *([] if found.residual is None else [found.residual])]
    linear = torch.stack([(direction.t() * slope).sum(dtype=torch.float64) for direction in directions])
    moved = [direction @ held.hessian for direction in directions]
    square = torch.stack([torch.stack([(a * b).sum(dtype=torch.float64) for b in directions]) for a in moved])
    if found.residual is None:
        betas = torch.zeros(1)
    grid = torch.cartesian_prod(alphas.double(), betas.double()).to(linear.device)
    steps = grid[:, : len(directions)]
    errors = ((steps @ square) * steps).sum(1) - 2 * steps @ linear
    alpha, beta = grid[errors.argmin()].tolist()
    return alpha, beta
