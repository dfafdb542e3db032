"""The loop around every kind of calibration: steps, validation, the best state, checkpoints."""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from loopq_compile.calibration import checkpoint, distributed, sharding
from loopq_compile.calibration.best_state import on_disk
from loopq_compile.calibration.data import Batch, pick, split
from loopq_compile.calibration.learnable import Latent, Learnable, Optimizer, Value
from loopq_compile.calibration.objective import LossParts
from loopq_compile.errors import LoopQError
from loopq_compile.graph.options import CalibrationOptions
from loopq_compile.memory import trim_bounded
from loopq_compile.operators.fusion import fusing
from loopq_compile.operators.precision import products_in
from loopq_compile.progress import StepProgress

Values = dict[str, Tensor]
_FAILURES = 10
"""This many steps in a row without a finite loss end the calibration."""


@dataclass
class Report:
    """What a phase of calibration did.

    Args:
        steps: steps done.
        tokens: tokens (or rows) that the student saw.
        start, best: validation loss before training, and of the state that was kept.
        best_step: when that state was reached; 0 if nothing better than the start was found.
        curve: per evaluation `{"step", "loss", "trajectory", "transition", "validation", "rate"}`.
        skipped: steps without a finite gradient, which changed nothing.
        refused: evaluations whose state the guard rejected.
    """

    steps: int = 0
    tokens: int = 0
    start: float = math.nan
    best: float = math.inf
    best_step: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)
    skipped: int = 0
    refused: int = 0


@dataclass(frozen=True)
class Plan:
    """What one phase of calibration changes, on what, and for how long.

    Args:
        learnables: what changes.
        batches: all calibration batches.
        options: see `CalibrationOptions`.
        steps: length of this phase.
        guard: checks the values before they are kept as best; returns a reason against them, or None.
        store: checkpoint file, None for none.
        fingerprint: identifies the calibration that a checkpoint belongs to.
    """

    learnables: Sequence[Learnable]
    batches: Sequence[Batch]
    options: CalibrationOptions
    steps: int
    guard: Callable[[Values], str | None]
    store: Path | None = None
    fingerprint: str = ""


class Steps(ABC):
    """One phase; a subclass defines the training loss (`backward`) and the validation loss (`validate`).

    Args:
        plan: what to do. The share of its batches that its options give is held out for validation.
    """

    def __init__(self, plan: Plan) -> None:
        self.learnables, self.batches = list(plan.learnables), plan.batches
        self.options, self.steps, self.guard = plan.options, plan.steps, plan.guard
        self.store, self.fingerprint = plan.store, plan.fingerprint
        self.learn, held = split(self.batches, self.options.validation, self.options.seed)
        self.held = held or self.learn[: max(1, len(self.learn) // 8)]
        self.optimizer = Optimizer(self.learnables, self.options.learning_rate, self.steps)
        self.report = Report()
        self.best = self._raws()
        self.rank, self.world = distributed.world(self.batches[0][0].device)
        self._stale = self._failures = 0

    @abstractmethod
    def backward(self, number: int) -> LossParts:
        """Loss of batch `number` at the current values; leaves gradients in the learnables."""

    @abstractmethod
    def validate(self, values: Mapping[str, Value]) -> float:
        """Loss on the held-out batches; constants that are not in `values` come from the graph."""

    def extra(self) -> Values:
        """What a checkpoint of this kind holds in addition."""
        return {}

    def restore_extra(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores what `extra` returned."""
        del tensors

    def run(self, title: str) -> Values:
        """Trains, and returns the best values by constant name; empty if the start is best.

        Raises:
            LoopQError: the loss is not finite, or the checkpoint is damaged or belongs to another calibration.
        """
        self._resume()
        with fusing(self.worth_fusing()), StepProgress(title, self.steps, self.report.steps) as bar:
            if not self.report.curve:
                self.evaluate(None)
            while self.report.steps < self.steps and self._stale < self.options.patience:
                parts = self.step()
                done = self.report.steps
                if done % self.options.evaluate_every == 0 or done == self.steps:
                    self.evaluate(parts)
                if done % self.options.checkpoint_every == 0:
                    self._save()
                loss = float(parts.total.detach()) if parts is not None else math.nan
                bar.advance(loss=loss, rate=self.optimizer.factor, validation=self.report.best)
        self._save()
        if not self.report.best_step:
            return {}
        return {item.name: item.value(self.best[item.name]).detach() for item in self.learnables}

    def worth_fusing(self) -> bool:
        """Whether compiling saves more seconds than it takes."""
        return self.options.fuses(self.steps)

    def values(self) -> dict[str, Value]:
        """The current values by constant name: differentiable tensors, and latent weights, which keep their own
        gradient."""
        return {item.name: item.current() for item in self.learnables}

    def step(self) -> LossParts | None:
        """Takes one step; None if it had no finite gradient and so changed nothing."""
        number = pick(self.learn, self.report.steps, self.options.seed)
        try:
            parts = self.backward(number)
        except torch.linalg.LinAlgError:  # a transform that cannot be inverted
            parts = None
        trim_bounded()  # most of a step's memory is free by now
        self.report.steps += 1
        self.report.tokens += self.batches[number][0].numel()
        if parts is not None and self.update(parts.total):
            self._failures = 0
            return parts
        self._fail()
        return None

    def update(self, loss: Tensor) -> bool:
        """Moves what is learned along its gradients, averaged over processes; False if these or the `loss` are not
        finite."""
        gradients = [gradient for item in self.learnables if (gradient := item.gradient) is not None]
        loss = loss.detach().clone()
        norm = sharding.average_gradients(gradients, loss)
        if not torch.isfinite(norm) or not torch.isfinite(loss):
            return False
        factor = (self.options.gradient_clip / (norm + 1e-6)).clamp_max(1.0)
        for gradient in gradients:
            sharding.rows(gradient).mul_(factor.to(gradient.device))
        self.optimizer.step()
        trim_bounded()
        return True

    def _fail(self) -> None:
        self.report.skipped += 1
        self._failures += 1
        for item in self.learnables:
            item.forget_gradient()
        if self._failures == _FAILURES:
            raise LoopQError(
                f"The loss was not finite in {_FAILURES} steps in a row (step {self.report.steps}). Lower "
                f"learning_rate (now {self.options.learning_rate:g}); checkpoints and the model are unharmed."
            )

    def evaluate(self, parts: LossParts | None) -> None:
        """Compares the current state with the best so far; the first call records the unchanged graph."""
        report = self.report
        with torch.no_grad():
            values = {n: v for n, v in self.values().items() if report.curve or isinstance(v, Latent)}
        refused = self.guard({name: value for name, value in values.items() if isinstance(value, Tensor)}) is not None
        report.refused += refused
        loss = math.nan if refused else self.validate(values)
        if not report.curve:
            report.start = loss
        if loss < report.best:
            report.best, report.best_step, self._stale = loss, report.steps, 0
            self.best = on_disk(self._raws(), self.store.parent if self.store else None)
        else:
            self._stale += 1
        names = ("prediction", "trajectory", "transition")
        row = {name: float(getattr(parts, name)) if parts is not None else 0.0 for name in names}
        report.curve.append({"step": report.steps, "validation": loss, "rate": self.optimizer.factor, **row})

    def precision(self) -> contextlib.AbstractContextManager[None]:
        """Runs matrix products in the type that the options ask for."""
        return products_in(self.options.precision, self.batches[0][0].device)

    def _raws(self) -> Values:
        return {item.name: item.now() for item in self.learnables}

    def _save(self) -> None:
        if self.store is None:
            return
        raws = self._raws()
        tensors = {f"raw.{name}": tensor for name, tensor in raws.items()}
        if self.report.best_step != self.report.steps:  # otherwise the best state is the current one
            tensors |= {f"best.{name}": tensor for name, tensor in self.best.items() if tensor is not raws[name]}
        tensors |= {f"optimizer.{name}": tensor for name, tensor in self.optimizer.state().items()}
        tensors |= {f"extra.{name}": tensor for name, tensor in self.extra().items()}
        facts = {"stale": self._stale, "failures": self._failures, "report": vars(self.report)}
        checkpoint.write(self.store, sharding.whole_in_first(tensors), {"fingerprint": self.fingerprint, **facts})

    def _resume(self) -> None:
        found = checkpoint.read(self.store, self.fingerprint) if self.store is not None else None
        if found is None:
            return
        tensors, facts = found
        for item in self.learnables:
            item.restore(tensors[f"raw.{item.name}"])
        for name, raw in self._raws().items():
            best = tensors.get(f"best.{name}")
            self.best[name] = raw if best is None else sharding.divided_as(best, raw)
        self.optimizer.restore(_under("optimizer.", tensors))
        self.restore_extra(_under("extra.", tensors))
        self.report = Report(**facts["report"])
        self._stale, self._failures = facts["stale"], facts["failures"]


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> Values:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
