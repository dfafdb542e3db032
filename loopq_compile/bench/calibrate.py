"""What a step of calibration spends its time on, and its tokens a second against the plain model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from loopq_compile.bench.results import Report
from loopq_compile.calibration.teacher import predictions
from loopq_compile.calibration.training import Training
from loopq_compile.errors import LoopQError
from loopq_compile.graph.options import CalibrationOptions
from loopq_compile.graph.scheme import Scheme
from loopq_compile.methods import get_pipeline
from loopq_compile.operators.fusion import fusing
from loopq_compile.planning.rehearsal import Rehearsal

PARTS = ("plain forward", "teacher", "weights", "forward", "backward", "update")
"""The plain forward pass of the captured model is not part of a step; all others are."""


def step_parts(
    captured: fx.GraphModule,
    scheme: Scheme,
    method: str,
    batches: Sequence[Any],
    options: CalibrationOptions,
    repeats: int = 3,
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Times the parts of a step in every phase of a method, by turns.

    Args:
        captured: the model's graph.
        scheme, method, options: as for `loopq_compile.compile`.
        batches: calibration batches; steps take the first `options.batch_rows` rows.
        repeats: how often each part is timed; the fastest counts.
        say: called with what is being done.

    Raises:
        LoopQError: the method has no phase of end-to-end calibration.
    """
    watched = _Watched(captured, scheme, get_pipeline(method), batches, options, say=say)
    watched.repeats = repeats
    watched.run()
    if not watched.phases:
        raise LoopQError(f"method={method!r} takes no steps of end-to-end calibration; loopq and flatquant-e2e do.")
    data: list[dict[str, Any]] = []
    for learned, (tokens, parts) in watched.phases.items():
        step = sum(seconds for name, seconds in parts.items() if name != "plain forward")
        data.append({"learns": learned, "tokens": tokens, "step": step, **parts})
    rows = [
        (
            line["learns"],
            *(f"{line[name]:.3f}" for name in PARTS),
            f"{line['step']:.3f}",
            f"{line['tokens'] / line['step']:,.0f}",
            f"{line['step'] / line['plain forward']:.1f}",
        )
        for line in data
    ]
    notes = [
        f"Seconds of a step of {data[-1]['tokens']:,} tokens; the fastest of {repeats}, by turns. Teacher: the model "
        "in full precision and its largest logits, asked once for every batch. Weights: from stored weights to "
        "integers. Backward: with recomputation, if any. The last column is a step divided by a plain forward pass."
    ]
    columns = ("learns", *PARTS, "step", "tokens a second", "forward passes")
    title = f"A step of {method} {scheme.name}, {options.precision}, {torch.get_num_threads()} threads"
    return Report("calibrate", title, columns, rows, data, notes=notes)


class _Watched(Rehearsal):
    """A rehearsal that times the parts of a step where a phase is ready to run."""

    repeats = 3

    def __init__(self, captured: fx.GraphModule, *arguments: Any, **named: Any) -> None:
        super().__init__(captured, *arguments, **named)
        self._captured = captured
        self.phases: dict[str, tuple[int, dict[str, float]]] = {}

    def observe(self, training: Training) -> None:
        kinds = ", ".join(dict.fromkeys(item.kind for item in training.learnables))
        inputs = training.batches[training.learn[0]]
        with fusing(training.worth_fusing()):
            training.step()
            times = [self._once(training, inputs) for _ in range(self.repeats)]
        self.phases[kinds] = inputs[0].numel(), {name: min(found[name] for found in times) for name in PARTS}

    def _once(self, training: Training, inputs: list[torch.Tensor]) -> dict[str, float]:
        parts: dict[str, float] = {}

        def timed(name: str, action: Callable[[], Any]) -> Any:
            start = time.perf_counter()
            result = action()
            if inputs[0].device.type == "cuda":
                torch.cuda.synchronize(inputs[0].device)
            parts[name] = time.perf_counter() - start
            return result

        def plain() -> None:
            with torch.no_grad(), training.precision():
                self._captured(*inputs)

        def loss() -> torch.Tensor:
            with torch.enable_grad(), training.precision():
                results, known = training.student.run_prepared(inputs, constants)
                logits, outputs = predictions(results, training.signature, training.vocabulary)
                states = [known[name] for name in training.ends], [known[name] for name in training.adapters]
                return training.objective(logits, outputs, *states, targets).total

        def prepare() -> dict[str, Any]:
            with torch.enable_grad(), training.precision():
                return training.student.prepare(training.values())

        timed("plain forward", plain)
        targets = timed("teacher", lambda: training.teacher.ask(inputs))
        constants = timed("weights", prepare)
        total = timed("forward", loss)
        timed("backward", total.backward)
        timed("update", lambda: training.update(total))
        return parts
