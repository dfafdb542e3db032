"""`calibrate`: trajectory-aware calibration (LoopQ section 4.4)."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, fx

from loopq_compile.calibration.batches import calibration_batches
from loopq_compile.calibration.best_state import on_disk
from loopq_compile.calibration.data import Batch, regroup
from loopq_compile.calibration.learnable import RATES, Learnable
from loopq_compile.calibration.sharding import Rows, whole
from loopq_compile.calibration.states import adapter_names, loop_ends
from loopq_compile.calibration.steps import Plan
from loopq_compile.calibration.student import Student
from loopq_compile.calibration.target_store import TargetStore
from loopq_compile.calibration.teacher import Teacher
from loopq_compile.calibration.training import Training
from loopq_compile.errors import InternalError, LoopQError
from loopq_compile.graph.device import device_of
from loopq_compile.graph.keys import GROUP, LEARN
from loopq_compile.graph.options import CalibrationOptions
from loopq_compile.graph.state import CompilerState, get_state, get_tensor, set_tensor
from loopq_compile.graph.weights import quantized_weights
from loopq_compile.operators import ops
from loopq_compile.operators.latent import LATENT
from loopq_compile.passes.base import Pass, PassResult
from loopq_compile.passes.quantize.collect_ranges import vocabulary_size
from loopq_compile.solvers.chains import find_chains

LARGEST_CONDITION = 1e4
"""A state is not kept if a transform's condition number exceeds this."""
KEPT_BYTES = 512 << 20
"""With `recompute="auto"`, everything is kept for the backward pass if a step then takes no more than this."""
LARGE = 16 << 20
"""Above this number of quantized weights, the sums of their gradients are kept in bfloat16."""
WEIGHT_BYTES = 16
"""What a step takes for every learned weight, the model and temporary tensors included."""


_NO_EFFECT = ("checkpoint", "checkpoint_every", "minutes")
"""Options that leave the result as it is; the steps that `minutes` led to are an option of their own."""


class Calibrate(Pass):
    """Learns what earlier passes inserted: transforms, ranges and clip ratios, rounding, adapters.

    Before: a program that runs, with tables, latent weights and adapters at their starting values. After: the same
    graph with learned values: the best on held-out batches, starting values included. The teacher is the captured
    model; labels are not used.

    Does nothing if there is nothing to learn.

    Args:
        share: part of the method's steps that this phase takes.
        default_steps: the method's steps, used if the options do not set them.
        kinds: what is learned, out of `loopq_compile.calibration.learnable.RATES`; None for everything.
        trajectory: whether states at the ends of loops count, or only predictions.
        final_share: overrides the option of that name.
    """

    def __init__(
        self,
        share: float = 1.0,
        default_steps: int = 300,
        kinds: Iterable[str] | None = None,
        trajectory: bool = True,
        final_share: float | None = None,
    ) -> None:
        super().__init__()
        self.share, self.default_steps, self.trajectory = share, default_steps, trajectory
        self.final_share = final_share
        self.kinds = frozenset(RATES if kinds is None else kinds)
        self._rounds = kinds is not None and "rounding" in self.kinds

    def requires(self, graph_module: fx.GraphModule) -> None:
        state = self.state(graph_module)
        if state.run.teacher is None:
            raise InternalError("calibrate needs the captured graph as a teacher; run it through compile or quantize.")
        if state.run.calibration is None:
            raise LoopQError(f"method={state.method!r} learns from calibration data: calibration=[token tensors].")
        if self._rounds and any(chain.latent is None for chain in find_chains(graph_module)):
            raise LoopQError("calibrate learns rounding only of latent weights: put LatentWeights() in front of it.")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        state = self.state(graph_module)
        with self.prepared(graph_module) as training:
            if training is None:
                return PassResult(graph_module, False)
            learned = training.run(f"Calibrating {state.method}")
        for name, value in learned.items():
            set_tensor(graph_module, name, whole(value).to(get_tensor(graph_module, name).dtype).contiguous())
        report, phases = training.report, state.results.setdefault("calibration", [])
        phases.append({**asdict(report), "phase": len(phases), "learned": count_by_kind(training.learnables)})
        state.note(
            f"{report.steps} steps, {report.tokens:,} tokens: divergence from the teacher on {len(training.held)} "
            f"batches {report.start:.4f} -> {report.best:.4f} (step {report.best_step})"
            + (f", {report.skipped} steps skipped" if report.skipped else "")
            + (f", {report.refused} states refused" if report.refused else "")
        )
        return PassResult(graph_module, bool(learned))

    def steps(self, options: CalibrationOptions) -> int:
        """The steps of this phase."""
        return max(1, round((options.steps or self.default_steps) * self.share))

    @contextlib.contextmanager
    def prepared(self, graph_module: fx.GraphModule) -> Iterator[Training | None]:
        """The phase, ready to run; None if there is nothing to learn. What is learned is out of the graph until the
        context ends, which puts the best back."""
        state = self.state(graph_module)
        options = state.options
        if self.final_share is not None:
            options = dataclasses.replace(options, final_share=self.final_share)
        if options.fused == "auto":  # the phases of a method share the cost of compiling
            total = options.steps or self.default_steps
            fused = options.fuses(total, quantized_weights(graph_module))
            options = dataclasses.replace(options, fused="on" if fused else "off")
        learnables = find_learnables(graph_module, self.kinds)
        if not learnables:
            yield None
            return
        phase = len(state.results.get("calibration", ()))
        training = self._training(graph_module, learnables, options, self.steps(options), phase)
        with _without_latents(graph_module, training):
            yield training

    def _training(
        self,
        graph_module: fx.GraphModule,
        learnables: list[Learnable],
        options: CalibrationOptions,
        steps: int,
        phase: int,
    ) -> Training:
        state = self.state(graph_module)
        vocabulary = vocabulary_size(graph_module)
        every = calibration_batches(state.run.calibration, state.signature, vocabulary, device_of(graph_module))
        batches = regroup(list(every), options.batch_rows)
        ends = loop_ends(graph_module) if self.trajectory else []
        adapters = adapter_names(graph_module, ends)
        names = [item.name for item in learnables]
        recompute = self._recompute(graph_module, batches[0])
        half = options.precision == "bfloat16" or any(item.kind == "rounding" for item in learnables)
        half = half or quantized_weights(graph_module) > LARGE
        rows = Rows.among(device_of(graph_module))
        for item in learnables:
            item.divide(rows)
        student = Student(
            graph_module,
            [*ends, *adapters],
            recompute,
            learned=names,
            gradients=torch.bfloat16 if half else torch.float32,
            rows=rows,
        )
        kept = state.run.targets.get(tuple(ends))
        if kept is None:
            kept = state.run.targets[tuple(ends)] = TargetStore(options.checkpoint, ends)
        teacher = Teacher(_teacher(state), state.signature, ends, vocabulary, options, kept)
        store, mark = None, ""
        if options.checkpoint:
            store = Path(options.checkpoint) / f"phase-{phase}.safetensors"
            mark = fingerprint(student.tensors, state, batches, names, steps)
        return Training(
            Plan(learnables, batches, options, steps, guard, store, mark),
            student,
            teacher,
            signature=state.signature,
            vocabulary=vocabulary,
            ends=ends,
            adapters=adapters,
        )

    def _recompute(self, graph_module: fx.GraphModule, batch: Batch) -> bool:
        wanted = get_state(graph_module).options.recompute
        if wanted != "auto":
            return wanted == "on"
        return activation_bytes(graph_module, batch) + WEIGHT_BYTES * quantized_weights(graph_module) > KEPT_BYTES


@contextlib.contextmanager
def _without_latents(graph_module: fx.GraphModule, training: Training) -> Iterator[None]:
    """Takes latent weights out of the graph while they are learned, so that they are not there once more; puts the
    best back. After an error they stay divided if the processes divide them: other processes may have had no error.
    What is kept for a report of such an error waits on disk."""
    names = [item.name for item in training.learnables if item.kind == "rounding"]
    snapshot = get_state(graph_module).run.snapshot
    if snapshot is not None:
        folder = training.store.parent if training.store else None
        snapshot.replace(on_disk({name: get_tensor(graph_module, name) for name in names}, folder))
    for name in names:
        shape = get_tensor(graph_module, name).shape
        set_tensor(graph_module, name, torch.zeros(1, 1, dtype=LATENT, device=device_of(graph_module)).expand(shape))
        del training.student.tensors[name]
    try:
        yield
    finally:
        for name in names:
            set_tensor(graph_module, name, training.best[name].contiguous())
    for name in names:
        set_tensor(graph_module, name, whole(training.best[name]).contiguous())


def find_learnables(graph_module: fx.GraphModule, kinds: frozenset[str]) -> list[Learnable]:
    """The tensors of the graph that may change, of the given `kinds`, at their current values."""
    scheme = get_state(graph_module).scheme
    static = scheme is not None and scheme.activation == "static"
    found: list[Learnable] = []
    for node in graph_module.graph.nodes:
        kind = node.meta.get(LEARN)
        if GROUP in node.meta:
            kind = "range" if static else "clip"
        if node.op == "get_attr" and kind in kinds:
            fraction = next((user.args[3] for user in node.users if user.target is ops.from_latent.default), 0)
            found.append(Learnable.of(str(node.target), kind, get_tensor(graph_module, str(node.target)), fraction))
    return found


def _teacher(state: CompilerState) -> fx.GraphModule:
    assert state.run.teacher is not None
    return state.run.teacher


def guard(values: dict[str, Tensor]) -> str | None:
    """A reason not to keep `values` (by constant name); None if there is none."""
    for name, value in values.items():
        if not torch.isfinite(value).all():
            return f"{name} is not finite"
        if name.endswith((".left", ".right")) and torch.linalg.cond(value.float()).max() > LARGEST_CONDITION:
            return f"{name} has a condition number above {LARGEST_CONDITION:g}"
    return None


def activation_bytes(graph_module: fx.GraphModule, batch: Batch) -> float:
    """Estimates how many bytes a step keeps for its backward pass without recomputation."""
    tokens = max(tensor[..., 0].numel() if tensor.is_floating_point() else tensor.numel() for tensor in batch)
    total = 0
    for node in graph_module.graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, Tensor) and value.is_floating_point():
            total += math.prod(size for size in value.shape if isinstance(size, int))
    return 4.0 * total * tokens


def count_by_kind(learnables: Sequence[Learnable]) -> dict[str, int]:
    """Counts of learned numbers, by kind."""
    counts: dict[str, int] = {}
    for item in learnables:
        counts[item.kind] = counts.get(item.kind, 0) + item.raw.numel()
    return counts


def fingerprint(
    tensors: Mapping[str, Tensor], state: CompilerState, batches: Sequence[Batch], learned: Sequence[str], steps: int
) -> str:
    """Hash of everything that affects the result: the graph's `tensors`, options, data, and what is `learned` how
    long."""
    options = {k: v for k, v in state.options.to_dict().items() if k not in _NO_EFFECT}
    digest = hashlib.sha256(repr((options, state.scheme, state.method, steps, list(learned))).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(_bytes(tensor))
    for batch in batches:
        for tensor in batch:
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
