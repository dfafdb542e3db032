"""Time and memory of a compilation, from doing a little of everything that its passes do.

Every pass of the method runs on a copy of the graph, on few batches. Learning takes a step or two, selection scores one
or two sequences, and the solver solves one weight of each shape. What was measured is multiplied by how often the
method does it. So the result knows the machine, the model, its length and the options.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassBase

from loopq_compile.calibration.batches import bind_batch, count_rows, count_tokens
from loopq_compile.calibration.data import split
from loopq_compile.calibration.target_store import target_bytes
from loopq_compile.calibration.training import Training
from loopq_compile.graph.constants import evaluate
from loopq_compile.graph.device import device_of
from loopq_compile.graph.options import CalibrationOptions
from loopq_compile.graph.scheme import Scheme
from loopq_compile.graph.shapes import infer_shapes
from loopq_compile.graph.state import copy_graph, get_state
from loopq_compile.graph.weights import quantized_weights
from loopq_compile.memory import LARGE, Peak, bound_heap, trim
from loopq_compile.operators.fusion import fusing
from loopq_compile.passes.learn.calibrate import Calibrate
from loopq_compile.passes.learn.calibrate_blocks import CalibrateBlocks
from loopq_compile.passes.learn.select_transforms import SEQUENCES, Scoring, SelectTransforms
from loopq_compile.passes.quantize.collect_ranges import CollectRanges
from loopq_compile.passes.quantize.solve_weights import SolveWeights
from loopq_compile.passes.transforms.insert_compensation import InsertCompensation
from loopq_compile.passes.transforms.smooth_activations import SmoothActivations
from loopq_compile.pipeline import Pipeline, pass_name
from loopq_compile.planning.costs import Cost, Learning, Phase, Rehearsed
from loopq_compile.processes import apart
from loopq_compile.solvers.chains import Chain, find_chains, find_families, write_codes
from loopq_compile.solvers.rtn import Grid
from loopq_compile.solvers.solve import Options, solve
from loopq_compile.solvers.statistics import Split

_SLOW = 20.0
"""What took this many seconds the first time is not done again to see what it takes when it is warm."""
_SOLVED = 24
"""Bytes for every number of the largest weight at the height of its solution."""
_NODE_SECONDS = 0.007
"""Seconds to capture a node and print it, on a core of 2024."""


class Rehearsal:
    """One compilation that is only rehearsed; the captured graph is not changed.

    Args:
        captured: the model's graph.
        scheme, pipeline, options: as for `loopq_compile.compile`.
        batches: all calibration batches.
        peak: since when memory counts; None for now.
        say: called with the name of every pass before it is rehearsed.
    """

    def __init__(
        self,
        captured: fx.GraphModule,
        scheme: Scheme,
        pipeline: Pipeline,
        batches: Sequence[Any],
        options: CalibrationOptions,
        peak: Peak | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._device = device_of(captured)
        self._peak = peak or Peak(self._device)
        self._pipeline, self._options, self._say = pipeline, options, say
        self._graph = copy_graph(captured)
        state = get_state(self._graph)
        state.scheme, state.method, state.options = scheme, pipeline.name, replace(options, checkpoint=None)
        bound = [bind_batch(batch, state.signature) for batch in batches]
        self._rows = list(map(count_rows, bound))
        self._tokens = sum(map(count_tokens, bound))
        enough = next((n for n in range(len(bound)) if sum(self._rows[:n]) >= 2 * options.batch_rows), len(bound))
        state.run.calibration = list(batches[:enough]) or None
        self._seen = sum(map(count_tokens, bound[:enough]))
        state.run.teacher = copy_graph(captured)
        if sum(tensor.numel() for tensor in captured.parameters()) > LARGE:
            bound_heap()

    def run(self) -> Rehearsed:
        """What every pass needs, in their order; capture comes first and the shapes of all nodes last. Under `torchrun`
        every process rehearses for itself."""
        try:
            with apart():
                return Rehearsed(tuple(self._run()), self._options, *self._split())
        finally:
            get_state(self._graph).run.close()

    def _run(self) -> list[Cost | Phase]:
        parts: list[Cost | Calibrate | Phase] = []
        learned: dict[frozenset[str], Learning | None] = {}
        last = {item.kinds: number for number, item in enumerate(self._pipeline) if isinstance(item, Calibrate)}
        for number, item in enumerate(self._pipeline):
            self._say(pass_name(item))
            self._peak.restart()
            if not self._tokens and isinstance(item, Calibrate | CalibrateBlocks | SelectTransforms | SolveWeights):
                continue
            if isinstance(item, Calibrate):  # of phases that learn the same, the last has the most to do
                if last[item.kinds] == number:
                    learned[item.kinds] = self._learn(item)
                parts.append(item)
            elif isinstance(item, CalibrateBlocks):
                parts.append(Phase(item, self._learn(Calibrate(kinds=item.kinds, default_steps=item.default_steps))))
            else:
                seconds, memory = self._rehearse(item)
                parts.append(Cost(pass_name(item), seconds, max(memory, self._peak.bytes())))
            trim()
        self._peak.restart()
        seconds = _timed(lambda: infer_shapes(self._graph))
        shapes = Cost("shapes", seconds, self._peak.bytes())
        capture = Cost("capture", _NODE_SECONDS * len(self._graph.graph.nodes), 0)
        found = [Phase(part, learned[part.kinds]) if isinstance(part, Calibrate) else part for part in parts]
        return [capture, *found, shapes]

    def _rehearse(self, item: PassBase) -> tuple[float, int]:
        """Seconds, and bytes that the measured peak does not have."""
        if isinstance(item, SelectTransforms):
            return self._select(item), 0
        if isinstance(item, SolveWeights) and (self._options.weight_solver or item.options.solver) != "rtn":
            return self._solve(item)
        seconds = _timed(lambda: Pipeline([item], self._pipeline.name).run(self._graph))
        if self._tokens and isinstance(item, CollectRanges | SmoothActivations | InsertCompensation):
            seconds *= max(1.0, self._measured(item) / self._seen)
        return seconds, 0

    def _learn(self, item: Calibrate) -> Learning | None:
        start = time.perf_counter()
        with item.prepared(self._graph) as training:
            if training is None:
                return None
            setup = time.perf_counter() - start
            self.observe(training)
            return self._phase_parts(training, setup)

    def observe(self, training: Training) -> None:
        """Called with every phase that is ready to run; does nothing here."""

    def _phase_parts(self, training: Training, setup: float) -> Learning:
        with fusing(training.worth_fusing()):
            number, held = training.learn[0], training.held[:1]
            asks = [
                _timed(lambda n=n: training.teacher.targets(n, training.batches[n]))  # type: ignore[misc]
                for n in {number, *held}
            ]
            training.learn, training.held = [number], held
            first = _timed(lambda: training.evaluate(None)), _timed(training.step)
            again = min(first) < _SLOW
            second = (_timed(lambda: training.evaluate(None)), _timed(training.step)) if again else first
            values = training.values()
            prepare = _timed(lambda: _without_gradient(lambda: training.student.prepare(values)))
        _, held_out = self._split()
        evaluation = prepare + max(0.0, second[0] - prepare) * held_out
        target = target_bytes(training.teacher.targets(number, training.batches[number]))
        setup += max(0.0, sum(first) - sum(second))
        return Learning(setup, min(asks), target, second[1], evaluation, self._peak.bytes())

    def _split(self) -> tuple[int, int]:
        """Numbers of all batches to learn from, and of those held out."""
        count = -(-sum(self._rows) // self._options.batch_rows)
        learn, held = split([[]] * count, self._options.validation, self._options.seed)
        return len(learn), len(held) or max(1, len(learn) // 8)

    def _select(self, item: SelectTransforms) -> float:
        groups, wanted = item.candidates(self._graph)
        if wanted < 1:
            return 0.0
        start = time.perf_counter()
        scoring = Scoring(self._graph, groups)
        setup = time.perf_counter() - start
        first = second = 0.0
        if scoring.batches:
            first = _timed(lambda: scoring.add(0))
            second = first if first > _SLOW else _timed(lambda: scoring.add(0))
        item.choose(self._graph, scoring.scores(), wanted)
        return setup + first + (min(SEQUENCES, sum(self._rows)) - 1) * second

    def _solve(self, item: SolveWeights) -> tuple[float, int]:
        """Solves one weight of each shape, and walks a batch once; the sums of statistics are counted."""
        chains = [chain for chain in find_chains(self._graph) if not chain.solved]
        if not chains:
            return 0.0, 0
        with fusing(self._options.fuses(weights=quantized_weights(self._graph))):
            seconds = self._round(chains, item)
        tokens, families = self._measured(item), find_families(chains, lambda linear: False)
        loops = max(family.calls for family in families)
        by_token, fixed = self._forward()
        seconds += tokens * by_token * (1 + 1 / loops) + fixed * (loops + 1)
        squares = [(family.chains[0].site.shape[1] ** 2, family.calls) for family in families]
        seconds += sum(2.0 * square * calls * tokens for square, calls in squares) / _product_rate(self._device)
        sums = 4 * sum(square for square, calls in squares if calls > 1)
        sizes = [chain.site.shape[0] * chain.site.shape[1] for chain in chains]
        values = 4 * tokens * max(chain.site.shape[0] for chain in chains)
        return seconds, self._peak.now() + sums + sum(sizes) + values + _SOLVED * max(sizes)

    def _round(self, chains: list[Chain], item: SolveWeights) -> float:
        """Rounds all weights to nearest, which puts the same tables into the graph as solving them; the seconds that
        this and solving take."""
        options, by_shape, seconds = replace(item.options, solver="gptq"), dict[tuple[int, ...], float](), 0.0
        for chain in chains:
            values = dict(evaluate(self._graph, [chain.plain, chain.quantize.args[1]]))
            plain = values[chain.plain].float()
            grid = chain.grid(values[chain.quantize.args[1]], plain.shape[1])
            shape = tuple(plain.shape)
            if shape not in by_shape:
                by_shape[shape] = _solving(plain, chain.original(self._graph), grid, options)
            start = time.perf_counter()
            write_codes(self._graph, chain, plain, grid.nearest(plain), grid, item.centered)
            seconds += by_shape[shape] + time.perf_counter() - start
            trim()
        self._graph.recompile()
        return seconds

    def _measured(self, item: Any) -> int:
        """Tokens that a pass measures."""
        return min(self._tokens, item.max_tokens or self._options.statistics_tokens)

    def _forward(self) -> tuple[float, float]:
        """Seconds of one token of a forward pass, and of what no token causes."""
        state = get_state(self._graph)
        inputs = bind_batch(state.run.calibration[0], state.signature, device=self._device)
        short = [tensor[:, :2] if tensor.ndim > 1 else tensor for tensor in inputs]
        with torch.no_grad():
            self._graph(*inputs)
            fixed, whole = _timed(lambda: self._graph(*short)), _timed(lambda: self._graph(*inputs))
        return max(0.0, whole - fixed) / count_tokens(inputs), fixed


def _solving(plain: Tensor, original: Tensor, grid: Grid, options: Options) -> float:
    """Seconds to solve a weight, for random inputs."""
    width = plain.shape[1]
    inputs = torch.randn(width + 64, width, generator=torch.Generator().manual_seed(0)).to(plain.device)
    moments = Split.of((inputs, None, None), 0)
    return _timed(lambda: solve(plain, original, grid, moments, options, "a weight"))


def _product_rate(device: torch.device) -> float:
    """Floating-point operations in a second of a float32 product."""
    x = torch.ones(1024, 1024, device=device)
    _ = float((x @ x)[0, 0])
    return 2 * 1024**3 / _timed(lambda: float((x @ x)[0, 0]))


def _without_gradient(action: Callable[[], Any]) -> Any:
    with torch.no_grad():
        return action()


def _timed(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - start
