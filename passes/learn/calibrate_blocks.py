"""`calibrate-blocks`: calibration block by block, without regard to loops (FlatQuant's way of learning)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from torch import fx

from loopq_compile.calibration.batches import calibration_batches
from loopq_compile.calibration.blocks import Block, find_blocks
from loopq_compile.calibration.blockwise import BlockTraining, Recorder, block_names, check_finite
from loopq_compile.calibration.data import Batch, regroup
from loopq_compile.calibration.learnable import Learnable
from loopq_compile.calibration.steps import Plan, Report
from loopq_compile.errors import InternalError, LoopQError
from loopq_compile.graph.device import device_of
from loopq_compile.graph.state import get_tensor, set_tensor
from loopq_compile.passes.base import Pass, PassResult
from loopq_compile.passes.learn.calibrate import count_by_kind, find_learnables, fingerprint, guard
from loopq_compile.passes.quantize.collect_ranges import vocabulary_size

KINDS = ("transform", "diagonal", "clip", "range", "weight_clip")
"""What is learned by default."""


class CalibrateBlocks(Pass):
    """Learns transforms, ranges and clip ratios layer by layer (Sun et al. 2024, FlatQuant).

    Before: a program that runs, with tables at their starting values. After: the same graph with learned values. The
    graph is cut where only the residual stream crosses, into about one block for each call of a layer
    (`loopq_compile.calibration.blocks`). Each block gets the inputs of the full-precision model and learns to reproduce
    its outputs. Calls of the same weights in several loops are one block, trained on all of them. The error of one
    block never reaches the next, and never returns through a loop. The best state on held-out batches is kept,
    starting values included. Reports go into `state.results["blocks"]`.

    Earlier passes must not change the residual stream: what blocks read and write must mean the same as in the
    captured model.

    Does nothing if nothing is quantized or there is nothing to learn.

    Args:
        default_steps: steps for each block, used if the options do not set them.
        kinds: what is learned, out of `loopq_compile.calibration.learnable.RATES`, without "rounding".

    Raises:
        LoopQError: rounding was asked for, which `calibrate` learns.
    """

    def __init__(self, default_steps: int = 200, kinds: Iterable[str] = KINDS) -> None:
        super().__init__()
        self.default_steps, self.kinds = default_steps, frozenset(kinds)
        if "rounding" in self.kinds:
            raise LoopQError("calibrate-blocks does not learn rounding: put latent-weights and calibrate behind it.")

    def requires(self, graph_module: fx.GraphModule) -> None:
        state = self.state(graph_module)
        if state.run.teacher is None:
            raise InternalError("calibrate-blocks needs the captured graph as a teacher; run it through compile.")
        if state.run.calibration is None:
            raise LoopQError(f"method={state.method!r} learns from calibration data: calibration=[token tensors].")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        state = self.state(graph_module)
        assert state.run.teacher is not None
        found = find_learnables(graph_module, self.kinds)
        sites = [site.name for site in state.sites.values() if site.reason is None]
        blocks = find_blocks(graph_module, state.run.teacher, sites) if found else []
        blocks = [block for block in blocks if _learned_in(block, found)]
        if not blocks:
            return PassResult(graph_module, False)
        options = state.options
        vocabulary = vocabulary_size(graph_module)
        every = calibration_batches(state.run.calibration, state.signature, vocabulary, device_of(graph_module))
        batches = regroup(list(every), options.batch_rows)
        recorder = Recorder(state.run.teacher, batches, block_names(blocks))
        results = state.results.setdefault("blocks", [])
        run, mark = len(results), ""
        if options.checkpoint:
            tensors = {name: get_tensor(graph_module, name) for name in _constants(graph_module)}
            mark = fingerprint(tensors, state, batches, [item.name for item in found], self._steps(graph_module))
        changed = False
        for number, block in enumerate(blocks):
            store = Path(options.checkpoint) / f"block-{run + number}.safetensors" if options.checkpoint else None
            title = f"Calibrating block {number + 1} of {len(blocks)}"
            training = self._training(graph_module, block, recorder, batches, store, f"{mark}-{number}")
            learned = training.run(title)
            for name, value in learned.items():
                set_tensor(graph_module, name, value.to(get_tensor(graph_module, name).dtype).contiguous())
            changed |= bool(learned)
            results.append(_result(block, training))
        state.note(_summary(blocks, [Report(**{k: r[k] for k in asdict(Report())}) for r in results[run:]]))
        return PassResult(graph_module, changed)

    def _steps(self, graph_module: fx.GraphModule) -> int:
        return self.state(graph_module).options.steps or self.default_steps

    def _training(
        self,
        graph_module: fx.GraphModule,
        block: Block,
        recorder: Recorder,
        batches: list[Batch],
        store: Path | None,
        mark: str,
    ) -> BlockTraining:
        state = self.state(graph_module)
        records = recorder.record(block)
        check_finite(records, [name for call in block.calls for name in call.outputs])
        learnables = _learned_in(block, find_learnables(graph_module, self.kinds))
        plan = Plan(learnables, batches, state.options, self._steps(graph_module), guard, store, mark)
        tensors = {name: get_tensor(graph_module, name) for name in block.attributes.values()}
        return BlockTraining(plan, block, tensors, records, state.signature)


def _constants(graph_module: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"]


def _learned_in(block: Block, learnables: list[Learnable]) -> list[Learnable]:
    read = set(block.attributes.values())
    return [item for item in learnables if item.name in read]


def _result(block: Block, training: BlockTraining) -> dict[str, object]:
    learned = count_by_kind(training.learnables)
    return {**asdict(training.report), "sites": list(block.sites), "calls": len(block.calls), "learned": learned}


def _summary(blocks: list[Block], reports: list[Report]) -> str:
    start, best = (math.fsum(getattr(report, key) for report in reports) / len(reports) for key in ("start", "best"))
    skipped = sum(report.skipped for report in reports)
    return (
        f"{len(blocks)} blocks ({sum(len(block.calls) for block in blocks)} calls), "
        f"{sum(report.steps for report in reports)} steps: mean relative error {start:.4g} -> {best:.4g}"
        + (f", {skipped} steps skipped" if skipped else "")
    )
