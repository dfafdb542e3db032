"""One weight from statistics to codes: target, scales, rounding, refinement."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loopq_compile.calibration import distributed
from loopq_compile.errors import LoopQError, did_you_mean
from loopq_compile.memory import trim_bounded
from loopq_compile.solvers.curvature import Curvature
from loopq_compile.solvers.gptq import gptq, refine_codes, refine_scales
from loopq_compile.solvers.loaq import choose, corrections
from loopq_compile.solvers.rtn import Grid, searched
from loopq_compile.solvers.statistics import Split

SOLVERS = ("rtn", "gptq", "loaq")


_MADE = 32
"""Bytes of temporary tensors for every number of a weight in one sweep of refinement."""


@dataclass(frozen=True)
class Options:
    """How weights are solved; see `loopq_compile.passes.quantize.solve_weights.SolveWeights`."""

    solver: str = "gptq"
    damping: float = 0.01
    act_order: bool = False
    alpha: float | None = 0.5
    beta: float | None = 0.2
    form: int = 2
    refine: int = 2
    refit_scales: bool = True

    @property
    def corrects(self) -> bool:
        """Whether the target of rounding differs from the weight."""
        return self.solver == "loaq" and (self.alpha != 0 or self.beta != 0)

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise LoopQError(f"SolveWeights(solver={self.solver!r}) is unknown.{did_you_mean(self.solver, SOLVERS)}")
        if self.form not in (1, 2, 3):
            raise LoopQError(f"SolveWeights(form={self.form!r}): LoaQ has the forms 1, 2 and 3.")
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            if value is not None and not 0 <= value <= 1:
                raise LoopQError(f"SolveWeights({name}={value!r}) must lie in [0, 1], or be None to be searched.")
        if not 0 < self.damping <= 10:
            raise LoopQError(f"SolveWeights(damping={self.damping!r}) must be positive and at most 10.")
        if self.refine < 0:
            raise LoopQError(f"SolveWeights(refine={self.refine!r}) must not be negative.")


@dataclass(frozen=True)
class Solution:
    """The result for one weight.

    Args:
        codes: integers as floats, `[out, K]`.
        grid: the scales they belong to.
        before, after: squared output error of rounding to nearest and of `codes`, over the target's squared output.
        alpha, beta: shares of LoaQ's corrections.
    """

    codes: Tensor
    grid: Grid
    before: float
    after: float
    alpha: float = 0.0
    beta: float = 0.0

    @staticmethod
    def empty(weight: Tensor, grid: Grid) -> Solution:
        """A solution of the same size to receive that of another process."""
        return Solution(torch.zeros_like(weight, dtype=torch.float32), grid, 0.0, 0.0)

    def sent(self, owner: int) -> Solution:
        """The solution of process `owner`, in every process."""
        if distributed.world(self.codes.device)[1] == 1:
            return self
        codes, scale = self.codes.to(torch.int8), self.grid.scale.clone(memory_format=torch.contiguous_format)
        numbers = torch.tensor([self.before, self.after, self.alpha, self.beta], dtype=torch.float64)
        numbers = numbers.to(codes.device)
        distributed.send(owner, [codes, scale, numbers])
        return Solution(codes.float(), self.grid.scaled(scale), *numbers.tolist())


def solve(weight: Tensor, original: Tensor, grid: Grid, moments: Split, options: Options, where: str) -> Solution:
    """Rounds `weight` `[out, K]` to `grid`.

    Args:
        weight: what the quantized graph would round to nearest, float32.
        original: the full-precision graph's weight, `[out, K₀]`.
        grid: the integers and the scales in use.
        moments: moments of the inputs; corrections are computed from the `fit` part, α and β chosen on the `held` part.
        options: options of the solver.
        where: the site, for errors.
    """
    target, alpha, beta = weight, 0.0, 0.0
    if options.solver == "loaq":
        alpha, beta = _shares(weight, original, moments, options, where)
    whole = moments.whole()
    curvature = Curvature(whole.hessian, options.damping, options.act_order, where)
    if alpha or beta:
        target = corrections(whole, curvature, weight, original).applied(weight, alpha, beta)
    codes, found = _rounded(weight, target, curvature, grid, options)
    if not torch.isfinite(found.scale).all() or not torch.isfinite(codes).all():
        raise LoopQError(f"Solving {where} gave NaN or infinite values; raise damping ({options.damping:g}).")
    energy = max(curvature.error(target), 1e-30)
    nearest = grid.values(grid.nearest(weight))
    return Solution(
        codes,
        found,
        curvature.error(nearest - target) / energy,
        curvature.error(found.values(codes) - target) / energy,
        alpha,
        beta,
    )


def _shares(weight: Tensor, original: Tensor, moments: Split, options: Options, where: str) -> tuple[float, float]:
    alphas = torch.linspace(0, 1, 11) if options.alpha is None else torch.tensor([options.alpha])
    betas = torch.linspace(0, 1, 21) if options.beta is None else torch.tensor([options.beta])
    if moments.held is None or (len(alphas) == 1 and len(betas) == 1):
        return float(alphas[-1]), float(betas[-1])
    curvature = Curvature(moments.fit.hessian, options.damping, where=where)
    found = corrections(moments.fit, curvature, weight, original)
    return choose(found, moments.held, weight, original, alphas, betas)


def _rounded(weight: Tensor, target: Tensor, curvature: Curvature, grid: Grid, options: Options) -> tuple[Tensor, Grid]:
    """Codes for `target`; no row is worse than rounding `weight` to nearest, and refinement only improves rows."""
    start = searched(target, curvature.matrix.diagonal(), grid) if options.refit_scales else grid
    codes = gptq(target, curvature, start)
    nearest = grid.nearest(weight)
    worse = row_errors(start.values(codes) - target, curvature) > row_errors(grid.values(nearest) - target, curvature)
    codes = torch.where(worse.unsqueeze(1), nearest, codes)
    found = grid.scaled(torch.where(worse.unsqueeze(1), grid.scale, start.scale))
    for _ in range(options.refine):
        trim_bounded(_MADE * weight.numel())
        if options.refit_scales:
            found = refine_scales(codes, target, curvature, found)
        codes = refine_codes(codes, target, curvature, found)
    trim_bounded(_MADE * weight.numel())
    if options.refit_scales:
        found = refine_scales(codes, target, curvature, found)
    return codes, found


def row_errors(difference: Tensor, curvature: Curvature) -> Tensor:
    """The squared output error `[out]` that each row of a `difference` of weights `[out, K]` causes."""
    return ((difference @ curvature.matrix) * difference).sum(1)
