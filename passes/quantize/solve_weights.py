"""`solve-weights`: integers for quantized weights that compensate their own rounding errors.

**Order.** A weight that T loops use must be known before its first use can be run, and its inputs in later loops depend
on weights that are solved after it. So the graphs are walked several times; each walk is a *sweep*. A weight is solved
at its first use. The inputs of that use are those that the weights solved so far produce; the inputs of later uses are
those of the sweep before (before the first sweep, of a run with the original weights). The inputs' second moments
hardly depend on roundings, so one sweep is enough for `gptq`.

Corrections of LoaQ do depend on them: they are computed from the *errors* of the inputs, and moments from a run with
weights rounded to nearest would correct errors in later loops that no longer exist. (Measured on the bundled model at
w4a16: perplexity 1.07 times that of full precision with form 1, 4.9 times with form 2, where gptq gives 1.02.) So, if
there are loops, `loaq` starts with a sweep without corrections, and then corrects half of what it finds: all weights of
all loops correct the same error at once, and full steps overshoot.

**Cost.** A sweep runs both graphs once over all batches and adds `K²` products per token for each input of width K
(twice that for `loaq`). A weight costs about three Cholesky factorizations and four products `K² out`. Memory holds, in
addition to the model, the live values of all batches and one `K²` matrix (`loaq`: four) for each looped input.

**Processes.** Under `torchrun` every process walks with its share of the batches. Each family of weights has an owner,
which gets the sums of all processes, solves, and sends integers and scales to the others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor, fx

from loopq_compile.calibration import distributed
from loopq_compile.calibration.batches import statistics_batches, token_mask
from loopq_compile.errors import InternalError, LoopQError
from loopq_compile.graph.device import device_of
from loopq_compile.graph.loops import get_tag
from loopq_compile.graph.state import CompilerState
from loopq_compile.graph.weights import quantized_weights
from loopq_compile.memory import trim_bounded
from loopq_compile.operators.fusion import fusing
from loopq_compile.passes.base import Pass, PassResult
from loopq_compile.passes.quantize.collect_ranges import vocabulary_size
from loopq_compile.progress import progress
from loopq_compile.solvers.chains import Chain, Family, find_chains, find_families, write_codes
from loopq_compile.solvers.observe import Layer, Observer, check_finite
from loopq_compile.solvers.solve import Options, Solution, solve
from loopq_compile.solvers.statistics import Split


class SolveWeights(Pass):
    """Chooses the integers of quantized weights by their effect on outputs on the calibration data.

    Before: `dequantize(quantize(W', scale), scale)` before linears, with W' the (transformed) weight. After:
    `dequantize(quantize(W' + rounding, scale), scale)`. The constant `rounding` makes the integers equal to the
    solver's; scales (or the clip ratios they are computed from) fit them. `pack-weights` stores the integers.

    A weight that T loops use is solved once, for the sum of the statistics of all T (see `loopq_compile.solvers.loaq`);
    one with a chain for every loop is solved separately for each loop.

    Does nothing with the solver "rtn", since quantize nodes round to nearest by themselves. Does nothing to chains that
    a solver has already processed, so that roundings learned since then stay.

    Args:
        solver: "rtn", "gptq", or "loaq". `weight_solver` of the calibration options takes precedence.
        damping: share of the Hessian's diagonal that is added to it.
        act_order: round columns by falling `diag H`.
        alpha, beta: shares of LoaQ's corrections; None to choose them on a quarter of the tokens.
        form: form of LoaQ: 1 compares outputs of linears, 2 the residual stream after them, 3 that stream after a norm.
        refine: sweeps of coordinate descent over the integers after GPTQ.
        refit_scales: whether to choose scales as well; otherwise they stay.
        sweeps: how often the graph is walked to solve.
        loop_weights: "equal", "relative" (a loop counts by its error relative to the energy of its inputs), or one
            number for every row of a per-loop table.
        centered: whether offsets put weights into the middle of their integers' intervals; False keeps weights as near
            to their old values as the integers allow, so that calibration can continue from there.
        max_tokens: about how many tokens are measured; None for the option `statistics_tokens`.

    Raises:
        LoopQError: no calibration data, unusable statistics, or unknown options.
    """

    def __init__(
        self,
        solver: str = "gptq",
        *,
        damping: float = 0.01,
        act_order: bool = False,
        alpha: float | None = 0.5,
        beta: float | None = 0.2,
        form: int = 2,
        refine: int = 2,
        refit_scales: bool = True,
        sweeps: int = 1,
        loop_weights: str | Sequence[float] = "equal",
        centered: bool = True,
        max_tokens: int | None = None,
    ) -> None:
        self.options = Options(solver, damping, act_order, alpha, beta, form, refine, refit_scales)
        if sweeps < 1:
            raise LoopQError(f"SolveWeights(sweeps={sweeps!r}) must be at least 1.")
        if isinstance(loop_weights, str) and loop_weights not in ("equal", "relative"):
            raise LoopQError(f"SolveWeights(loop_weights={loop_weights!r}): 'equal', 'relative' or a list of numbers.")
        self.sweeps, self.loop_weights, self.max_tokens = sweeps, loop_weights, max_tokens
        self.centered = centered

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        state = self.state(graph_module)
        options = replace(self.options, solver=state.options.weight_solver or self.options.solver)
        if options.solver == "rtn":
            return PassResult(graph_module, False)
        chains = [chain for chain in find_chains(graph_module) if not chain.solved and chain.latent is None]
        if not chains:
            return PassResult(graph_module, False)
        if state.run.calibration is None:
            raise LoopQError(f"The weight solver {options.solver!r} needs calibration data: calibration=[tokens].")
        if options.solver == "loaq" and state.run.teacher is None:
            raise InternalError("solve-weights: loaq compares with state.run.teacher, the graph before quantization.")
        vocabulary, device = vocabulary_size(graph_module), device_of(graph_module)
        wanted = self.max_tokens or state.options.statistics_tokens
        batches = statistics_batches(state.run.calibration, state.signature, vocabulary, device, wanted)
        solver = _Solver(graph_module, state, batches, options, self.loop_weights, self.centered)
        with fusing(state.options.fuses(weights=quantized_weights(graph_module))):
            solver.run(chains, self.sweeps)
        for note in solver.notes():
            state.note(note)
        return PassResult(graph_module, True)


class _Solver:
    """Walks the graphs and solves weights along the way."""

    def __init__(
        self,
        graph_module: fx.GraphModule,
        state: CompilerState,
        batches: list[list[Tensor]],
        options: Options,
        loop_weights: str | Sequence[float],
        centered: bool,
    ) -> None:
        self.graph_module, self.state, self.batches = graph_module, state, batches
        self.options, self.loop_weights, self.centered = options, loop_weights, centered
        self.errors: dict[str, list[tuple[float, ...]]] = {}
        self.rank, self.world = distributed.world(device_of(graph_module))

    def run(self, chains: list[Chain], sweeps: int) -> None:
        """Runs all sweeps."""
        observer = self._observer()
        families = find_families(chains, lambda linear: observer.write(linear) is not None)
        plan = [self.options] * sweeps
        later: dict[int, Split] = {}
        if any(family.calls > 1 for family in families):
            later = self._measure(families)
            if self.options.corrects:
                plan.insert(0, replace(self.options, alpha=0.0, beta=0.0))
        for number, options in enumerate(plan, 1):
            later = self._sweep(families, later, options, again=number < len(plan))

    def notes(self) -> Iterator[str]:
        """Lines about the errors before and after, by the last part of the sites' names."""
        for kind, found in self.errors.items():
            before, after, alpha, beta = (sum(numbers) / len(found) for numbers in zip(*found, strict=True))
            shares = f", alpha {alpha:.2f}, beta {beta:.2f}" if self.options.solver == "loaq" else ""
            yield f"{kind}: relative output error {before:.2e} -> {after:.2e} ({len(found)} weights{shares})"

    def _observer(self) -> Observer:
        teacher = self.state.run.teacher if self.options.solver == "loaq" else None
        masks = [token_mask(self.state.signature, batch) for batch in self.batches]
        return Observer(self.graph_module, teacher, self.batches, self.options.form, masks)

    def _measure(self, families: list[Family]) -> dict[int, Split]:
        """Sums of the moments of every call but the first, by family, with the current weights."""
        later: dict[int, Split] = {}
        stops = [(index, number) for index, family in enumerate(families) for number in range(1, family.calls)]
        for index, _, split, _ in self._walk(families, stops, "Measuring later loops"):
            if split is not None:
                later[index] = later[index].add(split) if index in later else split
        return later

    def _sweep(
        self, families: list[Family], later: dict[int, Split], options: Options, again: bool
    ) -> dict[int, Split]:
        """Solves all weights. Returns what `_measure` would, with the weights of this sweep; nothing unless `again`."""
        measured: dict[int, Split] = {}
        self.errors = defaultdict(list)
        stops = [(index, call) for index, family in enumerate(families) for call in range(family.calls if again else 1)]
        for index, number, split, observer in self._walk(families, stops, "Solving weights"):
            if number:
                if split is not None:
                    measured[index] = measured[index].add(split) if index in measured else split
                continue
            if split is not None and index in later:
                split.add(later.pop(index))
            for chain in families[index].chains:
                found = self._solve(observer, chain, split, options, self._owner(index))
                errors = found.before, found.after, found.alpha, found.beta
                self.errors[chain.site.name.rpartition(".")[2]].append(errors)
        return measured

    def _walk(
        self, families: list[Family], stops: list[tuple[int, int]], title: str
    ) -> Iterator[tuple[int, int, Split | None, Observer]]:
        """Walks to the `stops` (family and call) in program order, and yields the weighted moments there; None if
        another process owns the family."""
        observer = self._observer()
        position = observer.walk.position
        order = sorted(stops, key=lambda stop: position(families[stop[0]].first(stop[1], position)[0]))
        for index, number in progress(order, title, len(order)):
            linear, chain = families[index].first(number, position)
            weight = observer.walk.constant(chain.plain).float()
            split = observer.measure(Layer(linear, weight, chain.original(self.graph_module)))
            trim_bounded()  # moments are sums over batches, with temporary matrices for each
            owner = self._owner(index)
            split.gather(owner, held=self.options.solver == "loaq")
            if owner != self.rank:
                yield index, number, None, observer
                continue
            check_finite(linear, split)
            yield index, number, split.times(self._loop_weight(linear, split)), observer

    def _owner(self, family: int) -> int:
        """The process that solves a family."""
        return family % self.world

    def _loop_weight(self, linear: fx.Node, split: Split) -> float:
        """The weight of a call in the sum over loops."""
        if self.loop_weights == "equal":
            return 1.0
        if self.loop_weights == "relative":
            return split.fit.tokens / max(float(split.fit.hessian.diagonal().sum()), 1e-12)
        row = self.state.loops.row(get_tag(linear))
        if row >= len(self.loop_weights):
            raise LoopQError(f"loop_weights has {len(self.loop_weights)} numbers; {linear.name!r} runs in loop {row}.")
        return float(self.loop_weights[row])

    def _solve(self, observer: Observer, chain: Chain, split: Split | None, options: Options, owner: int) -> Solution:
        plain = observer.walk.constant(chain.plain)
        grid = chain.grid(observer.walk.constant(chain.quantize.args[1]), plain.shape[1])
        if split is None:
            solution = Solution.empty(plain, grid)
        else:
            solution = solve(plain.float(), chain.original(self.graph_module), grid, split, options, chain.where)
        solution = solution.sent(owner)
        write_codes(self.graph_module, chain, plain, solution.codes, solution.grid, self.centered)
        return solution
