"""The loop of calibration: steps, validation, the best state, checkpoints."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loopq_compile.errors import LoopQError
from loopq_compile.options import CalibrationOptions
from loopq_compile.progress import StepProgress
from loopq_compile.signature import Signature
from loopq_compile.trajectory import checkpoint, distributed
from loopq_compile.trajectory.data import Batch, pick
from loopq_compile.trajectory.learnable import Learnable, Optimizer
from loopq_compile.trajectory.objective import LossParts, Objective, divergence, token_mean
from loopq_compile.trajectory.student import Student
from loopq_compile.trajectory.teacher import Teacher, predictions

Values = dict[str, Tensor]
_FAILURES = 10
"""So many steps in a row without a finite loss end the calibration."""


@dataclass
class Report:
    """What a phase of calibration did.

    Args:
        steps: steps done.
        tokens: tokens (or rows) that the student saw.
        start, best: validation loss before and of the state that was kept.
        best_step: when that state was reached.
        curve: per evaluation `{"step", "loss", "trajectory", "transition", "validation", "rate"}`.
        skipped: steps without a finite gradient, which changed nothing.
    """

    steps: int = 0
    tokens: int = 0
    start: float = math.nan
    best: float = math.inf
    best_step: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)
    skipped: int = 0


class Training:
    """One phase.

    Args:
        student, teacher: both see the same batches.
        learnables: what changes.
        batches: all calibration batches; `learn` and `held` are numbers of those to learn from and to validate on.
        ends, adapters: names of the nodes at the end of each loop and of the adapters behind.
        options: see `CalibrationOptions`.
        steps: length of this phase.
        guard: looks at the values before they are kept as best; returns a reason against it, or None.
        store: checkpoint file, None for none.
        fingerprint: identifies the calibration that a checkpoint belongs to.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        learnables: Sequence[Learnable],
        batches: Sequence[Batch],
        learn: Sequence[int],
        held: Sequence[int],
        *,
        signature: Signature,
        vocabulary: int | None,
        ends: Sequence[str],
        adapters: Sequence[str],
        options: CalibrationOptions,
        steps: int,
        guard: Callable[[Values], str | None],
        store: Path | None,
        fingerprint: str,
    ) -> None:
        self.student, self.teacher, self.learnables = student, teacher, list(learnables)
        self.batches, self.learn, self.held = batches, learn, held or learn[: max(1, len(learn) // 8)]
        self.signature, self.vocabulary, self.ends, self.adapters = signature, vocabulary, ends, adapters
        self.options, self.steps, self.guard = options, steps, guard
        self.store, self.fingerprint = store, fingerprint
        self.objective = Objective(options, len(ends))
        self.optimizer = Optimizer(self.learnables, options.learning_rate, steps)
        self.report = Report()
        self.best = self._raws()
        self.rank, self.world = distributed.world()
        self._stale = 0

    def run(self, title: str) -> Values:
        """Trains, and returns the best values by constant name."""
        self._resume()
        with StepProgress(title, self.steps, self.report.steps) as bar:
            if not self.report.curve:
                self._evaluate(None)
            failures = 0
            while self.report.steps < self.steps and self._stale < self.options.patience:
                parts = self._step()
                failures = failures + 1 if parts is None else 0
                if failures == _FAILURES:
                    raise LoopQError(
                        f"The loss was not finite in {_FAILURES} steps in a row (step {self.report.steps}). Lower "
                        f"learning_rate (now {self.options.learning_rate:g}); checkpoints and the model are unharmed."
                    )
                done = self.report.steps
                if done % self.options.evaluate_every == 0 or done == self.steps:
                    self._evaluate(parts)
                if done % self.options.checkpoint_every == 0 or done == self.steps:
                    self._save()
                loss = float(parts.total.detach()) if parts is not None else math.nan
                bar.advance(loss=loss, rate=self.optimizer.factor, validation=self.report.best)
        return {item.name: item.value(self.best[item.name]).detach() for item in self.learnables}

    def _step(self) -> LossParts | None:
        number = pick(self.learn, self.report.steps, self.options.seed)
        inputs = distributed.shard(self.batches[number], self.rank, self.world)
        targets = self.teacher.targets(number, inputs)
        if self.ends and self.report.steps % self.options.refresh == 0:
            self._refresh(inputs, targets)
        with torch.enable_grad(), self._precision():
            results, known = self.student.run(inputs, {item.name: item.value() for item in self.learnables})
            logits, outputs = predictions(results, self.signature, self.vocabulary)
            states, adapted = self._states(known)
            parts = self.objective(logits, outputs, states, adapted, targets)
        parts.total.backward()
        self.report.steps += 1
        self.report.tokens += self.batches[number][0].numel()
        gradients = [item.raw.grad for item in self.learnables if item.raw.grad is not None]
        distributed.average(gradients)
        norm = torch.nn.utils.get_total_norm(gradients)
        if not torch.isfinite(norm) or not torch.isfinite(parts.total):
            self.report.skipped += 1
            for item in self.learnables:
                item.raw.grad = None
            return None
        torch.nn.utils.clip_grads_with_norm_([item.raw for item in self.learnables], self.options.gradient_clip, norm)
        self.optimizer.step()
        return parts

    def _states(self, known: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        return [known[name] for name in self.ends], [known[name] for name in self.adapters]

    def _refresh(self, inputs: Batch, targets: Any) -> None:
        with torch.no_grad(), self._precision():
            _, known = self.student.run(inputs, {item.name: item.value() for item in self.learnables})
        self.objective.update_shares(self._states(known)[0], targets)
        distributed.average([self.objective.final_shares])

    def _evaluate(self, parts: LossParts | None) -> None:
        loss = self.validate({item.name: item.value().detach() for item in self.learnables})
        report = self.report
        if not report.curve:
            report.start = loss
        reason = self.guard({item.name: item.value().detach() for item in self.learnables})
        if loss < report.best and reason is None:
            report.best, report.best_step, self._stale = loss, report.steps, 0
            self.best = self._raws()
        else:
            self._stale += 1
        names = ("prediction", "trajectory", "transition")
        row = {name: float(getattr(parts, name)) if parts is not None else 0.0 for name in names}
        report.curve.append({"step": report.steps, "validation": loss, "rate": self.optimizer.factor, **row})

    def validate(self, values: Values) -> float:
        """Mean divergence from the teacher on the held-out batches."""
        losses = []
        for number in self.held:
            inputs = distributed.shard(self.batches[number], self.rank, self.world)
            targets = self.teacher.targets(number, inputs)
            with torch.no_grad(), self._precision():
                results, _ = self.student.run(inputs, values)
                logits, outputs = predictions(results, self.signature, self.vocabulary)
                if logits is not None:
                    losses.append(token_mean(divergence(logits, targets, 1.0), targets.mask))
                else:
                    losses.append(self.objective(None, outputs, [], [], targets).total)
        mean = torch.stack(losses).mean()
        distributed.average([mean])
        return float(mean)

    @contextlib.contextmanager
    def _precision(self) -> Iterator[None]:
        enabled = self.options.precision == "bfloat16"
        with torch.autocast(self.batches[0][0].device.type, dtype=torch.bfloat16, enabled=enabled):
            yield

    def _raws(self) -> Values:
        return {item.name: item.raw.detach().clone() for item in self.learnables}

    def _save(self) -> None:
        if self.store is None or self.rank:
            return
        tensors = {f"raw.{name}": tensor for name, tensor in self._raws().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        tensors |= {f"optimizer.{name}": tensor for name, tensor in self.optimizer.state().items()}
        tensors["final_shares"] = self.objective.final_shares
        checkpoint.write(
            self.store,
            tensors,
            {"fingerprint": self.fingerprint, "stale": self._stale, "report": vars(self.report)},
        )

    def _resume(self) -> None:
        found = checkpoint.read(self.store, self.fingerprint) if self.store is not None else None
        if found is None:
            return
        tensors, facts = found
        with torch.no_grad():
            for item in self.learnables:
                item.raw.copy_(tensors[f"raw.{item.name}"])
        self.best = {item.name: tensors[f"best.{item.name}"] for item in self.learnables}
        prefix = "optimizer."
        state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        self.optimizer.restore(state)
        self.objective.final_shares = tensors["final_shares"]
        self.report, self._stale = Report(**facts["report"]), facts["stale"]
