"""`solve-weights`: integers for quantized weights that make up for their own rounding errors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from loopq_compile.calibration import calibration_batches
from loopq_compile.errors import InternalError, LoopQError
from loopq_compile.loops import get_tag
from loopq_compile.operators import ops
from loopq_compile.passes.base import Pass, PassResult
from loopq_compile.passes.collect_ranges import vocabulary_size
from loopq_compile.passes.constants import chain_name
from loopq_compile.passes.insert import add_constant, call, inserting
from loopq_compile.passes.weights import site_calls, weight_chain
from loopq_compile.progress import progress
from loopq_compile.solvers import Grid, Moments, Options, Solution, Walk, solve
from loopq_compile.solvers.observe import Observer
from loopq_compile.state import Site, get_tensor, set_tensor

_aten = torch.ops.aten
SOLVED = "loopq_solver"
"""Key in `node.meta` of an addition of rounding offsets that a solver wrote."""


@dataclass
class Weight:
    """A chain from a stored weight to the linears that read it: all calls of a weight, or those of one loop."""

    site: Site
    end: fx.Node
    calls: list[fx.Node] = field(default_factory=list)

    @property
    def quantize(self) -> fx.Node:
        """The node that rounds; the last but one of the chain."""
        return self.end.args[0]  # type: ignore[return-value]

    @property
    def rounding(self) -> fx.Node | None:
        """The addition of rounding offsets, None if the chain has none."""
        before = self.quantize.args[0]
        return before if isinstance(before, fx.Node) and before.target is _aten.add.Tensor else None


class SolveWeights(Pass):
    """Chooses the integers of quantized weights by what they do to outputs on the calibration data.

    Before: `dequantize(quantize(W', scale), scale)` in front of linears, W' the (transformed) weight. After:
    `dequantize(quantize(W' + rounding, scale), scale)` with a constant `rounding` such that the integers are the solver's;
    `pack-weights`, which stands directly behind, stores them.

    A weight that T loops use is solved once, for the sum of the statistics of all T (see `loopq_compile.solvers.loaq`); one
    with a chain for every loop is solved for each loop alone. The graph is walked in program order and a weight is
    solved at its first use: inputs of that use come from weights that are solved, those of its uses in later loops
    from a run beforehand with the weights as they are, or from the sweep before.

    Does nothing with `solver="rtn"`, which is what quantize nodes do by themselves, and to chains that are solved.

    Args:
        solver: "rtn", "gptq", or "loaq".
        damping: added to the diagonal of the Hessian, as a share of it.
        act_order: round columns by falling `diag H`.
        alpha, beta: shares of LoaQ's corrections; None to choose them on a quarter of the tokens.
        form: of LoaQ: 1 compares outputs of linears, 2 what they make of the residual stream, 3 that behind a norm.
        refine: sweeps of coordinate descent behind GPTQ.
        refit_scales: also choose scales; otherwise they stay.
        sweeps: how often the graph is walked; each sweep starts from the weights of the one before.
        loop_weights: "equal", "relative" (each loop by the energy of its inputs), or one number per row of a per-loop table.

    Raises:
        LoopQError: no calibration data, unusable statistics, or unknown options.
    """

    def __init__(
        self,
        solver: str = "loaq",
        *,
        damping: float = 0.01,
        act_order: bool = False,
        alpha: float | None = None,
        beta: float | None = None,
        form: int = 2,
        refine: int = 0,
        refit_scales: bool = False,
        sweeps: int = 1,
        loop_weights: str | Sequence[float] = "equal",
    ) -> None:
        self.options = Options(solver, damping, act_order, alpha, beta, form, refine, refit_scales)
        if sweeps < 1:
            raise LoopQError(f"SolveWeights(sweeps={sweeps!r}) must be at least 1.")
        if isinstance(loop_weights, str) and loop_weights not in ("equal", "relative"):
            raise LoopQError(f"SolveWeights(loop_weights={loop_weights!r}) is 'equal', 'relative' or a list of numbers.")
        self.sweeps, self.loop_weights = sweeps, loop_weights

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        weights = [weight for weight in _weights(graph_module) if not _is_solved(weight)]
        if self.options.solver == "rtn" or not weights:
            return PassResult(graph_module, False)
        state = self.state(graph_module)
        if state.calibration is None:
            raise LoopQError(f"The weight solver {self.options.solver!r} needs calibration data: calibration=[tokens].")
        batches = list(calibration_batches(state.calibration, state.signature, vocabulary_size(graph_module)))
        families = _families(weights, Observer.needs_own_moments(graph_module, self.options))
        later: dict[int, tuple[Moments, Moments | None]] = {}
        if any(len(family[0].calls) > 1 for family in families):
            later = self._walk(graph_module, families, batches, later, solving=False)
        reports: dict[str, list[Solution]] = {}
        for sweep in range(self.sweeps):
            reports = defaultdict(list)
            later = self._walk(graph_module, families, batches, later, True, reports, sweep == self.sweeps - 1)
        self._report(state, reports)
        return PassResult(graph_module, True)

    def _walk(
        self,
        graph_module: fx.GraphModule,
        families: list[list[Weight]],
        batches: list[list[Tensor]],
        later: dict[int, tuple[Moments, Moments | None]],
        solving: bool,
        reports: dict[str, list[Solution]] | None = None,
        last: bool = False,
    ) -> dict[int, tuple[Moments, Moments | None]]:
        """One run over all batches. Returns the summed moments of every family's later calls."""
        walk = Walk(graph_module, batches)
        observer = Observer(graph_module, walk, batches, self.options)
        first = 0 if solving else 1
        stops = [
            (min(walk.position(weight.calls[number]) for weight in family), index, number)
            for index, family in enumerate(families)
            for number in range(first, 1 if last else len(family[0].calls))
        ]
        collected: dict[int, tuple[Moments, Moments | None]] = {}
        title = "Solving weights" if solving else "Measuring later loops"
        for _, index, number in progress(sorted(stops), title, total=len(stops)):
            family = families[index]
            linear = min((weight.calls[number] for weight in family), key=walk.position)
            moments = observer.observe(linear, range(len(batches)))
            moments = self._weighted(graph_module, linear, moments)
            if number == 0:
                moments = _sum(moments, later.get(index))
                for weight in family:
                    solution = self._solve(graph_module, walk, weight, moments)
                    assert reports is not None
                    reports[weight.site.name.rpartition(".")[2]].append(solution)
            else:
                collected[index] = _sum(moments, collected.get(index))
        return collected

    def _weighted(
        self, graph_module: fx.GraphModule, linear: fx.Node, moments: tuple[Moments, Moments | None]
    ) -> tuple[Moments, Moments | None]:
        if self.loop_weights == "equal":
            return moments
        fit, held = moments
        if self.loop_weights == "relative":
            energy = float(fit.hessian.diagonal().sum()) / max(fit.tokens, 1)
            weight = 1 / max(energy, 1e-12)
        else:
            row = self.state(graph_module).loops.row(get_tag(linear))
            if row >= len(self.loop_weights):
                raise LoopQError(f"loop_weights has {len(self.loop_weights)} numbers, {linear.name!r} runs in row {row}.")
            weight = float(self.loop_weights[row])
        return fit.scaled(weight), held.scaled(weight) if held else None

    def _solve(
        self, graph_module: fx.GraphModule, walk: Walk, weight: Weight, moments: tuple[Moments, Moments | None]
    ) -> Solution:
        node = weight.quantize
        size, q_min, q_max = (int(argument) for argument in node.args[2:5])  # type: ignore[arg-type]
        offset = weight.rounding
        source: Any = offset.args[0] if offset else node.args[0]
        scale = walk.constant(node.args[1])  # type: ignore[arg-type]
        plain = walk.constant(source)
        chain = weight_chain(weight.calls[0])
        original = get_tensor(graph_module, str(chain[0].target)).detach().float()
        grid = Grid(scale.float().expand(plain.shape[0], plain.shape[1] // size), size, q_min, q_max)
        fit, held = moments
        # `solve` adds the held moments to its own copy; other weights of the family need them apart.
        copy = Moments(*(t.clone() if isinstance(t, Tensor) else t for t in (fit.hessian, fit.cross, fit.residual)), fit.tokens)
        where = f"{weight.site.name!r} ({', '.join(_loop(node) for node in weight.calls)})"
        solution = solve(plain.float(), original, grid, copy, held, self.options, where)
        _write(graph_module, weight, plain, scale, solution)
        return solution

    def _report(self, state: Any, reports: dict[str, list[Solution]]) -> None:
        for kind, solutions in reports.items():
            before = sum(solution.before for solution in solutions) / len(solutions)
            after = sum(solution.after for solution in solutions) / len(solutions)
            shares = ""
            if self.options.solver == "loaq":
                alpha = sum(solution.alpha for solution in solutions) / len(solutions)
                beta = sum(solution.beta for solution in solutions) / len(solutions)
                shares = f", alpha {alpha:.2f}, beta {beta:.2f}"
            state.note(f"{kind}: relative output error {before:.2e} -> {after:.2e} ({len(solutions)} weights{shares})")


def _loop(node: fx.Node) -> str:
    tag = get_tag(node)
    return str(tag) if tag else "outside loops"


def _weights(graph_module: fx.GraphModule) -> list[Weight]:
    """Quantized chains in order of first use."""
    found: dict[fx.Node, Weight] = {}
    for site, linears in site_calls(graph_module):
        for linear in linears:
            end = weight_chain(linear)[-1]
            if end.target is ops.dequantize.default and end.args[0].target is ops.quantize.default:  # type: ignore[union-attr]
                found.setdefault(end, Weight(site, end)).calls.append(linear)
    return list(found.values())


def _is_solved(weight: Weight) -> bool:
    return weight.rounding is not None and SOLVED in weight.rounding.meta


def _families(weights: list[Weight], alone: set[str]) -> list[list[Weight]]:
    """Weights that read the same tensors in all their calls, and so share statistics."""
    families: dict[Any, list[Weight]] = defaultdict(list)
    for weight in weights:
        key: tuple[Any, ...] = tuple(node.args[0] for node in weight.calls)
        if any(node.name in alone for node in weight.calls):
            key = (*key, weight.end)
        families[key].append(weight)
    return list(families.values())


def _sum(
    mine: tuple[Moments, Moments | None], other: tuple[Moments, Moments | None] | None
) -> tuple[Moments, Moments | None]:
    if other is None:
        return mine
    return mine[0].plus(other[0]), mine[1].plus(other[1]) if mine[1] else None


def _write(graph_module: fx.GraphModule, weight: Weight, plain: Tensor, scale: Tensor, solution: Solution) -> None:
    """Puts the offsets, and scales if they changed, into the chain."""
    node, graph = weight.quantize, graph_module.graph
    name = chain_name(graph_module, weight.end)
    if solution.grid.scale.ne(scale).any():
        fitted = add_constant(graph_module, f"{name}_scale_fitted", solution.grid.scale.to(scale.dtype))
        for user in [user for user in node.args[1].users if user in (node, weight.end)]:  # type: ignore[union-attr]
            user.replace_input_with(node.args[1], fitted)  # type: ignore[arg-type]
        scale = get_tensor(graph_module, str(fitted.target))
    grid = solution.grid.scaled(scale.float().expand_as(solution.grid.scale))
    # In single precision whatever the weight's type: the sum then hits the middle of the integer's interval.
    offset = grid.values(solution.codes) - plain.float()
    if weight.rounding is None:
        table = add_constant(graph_module, f"{name}_rounding", offset)
        with inserting(graph, before=node, tag=None, site=weight.site.name):
            added = call(graph, _aten.add.Tensor, node.args[0], table)
        node.replace_input_with(node.args[0], added)  # type: ignore[arg-type]
    else:
        added = weight.rounding
        set_tensor(graph_module, str(added.args[1].target), offset)  # type: ignore[union-attr]
    added.meta[SOLVED] = True
    codes = ops.quantize(plain + offset, scale, grid.size, grid.q_min, grid.q_max)
    if not torch.equal(codes.float(), solution.codes):
        raise InternalError(f"The rounding offsets of {weight.site.name!r} do not give the solver's integers.")
