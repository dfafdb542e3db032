"""End-to-end calibration: compares the student with the teacher's predictions and its states at the ends of loops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from loopq_compile.calibration import distributed
from loopq_compile.calibration.data import Batch
from loopq_compile.calibration.learnable import Value
from loopq_compile.calibration.objective import LossParts, Objective, Targets, divergence, token_mean
from loopq_compile.calibration.steps import Plan, Steps, Values
from loopq_compile.calibration.student import Student
from loopq_compile.calibration.teacher import Teacher, predictions
from loopq_compile.graph.signature import Signature


class Training(Steps):
    """One phase of end-to-end calibration.

    Args:
        plan: see `Steps`.
        student, teacher: both see the same batches.
        signature, vocabulary: find the logits among the results.
        ends, adapters: names of the nodes at the end of each loop, and of the adapters after them.
    """

    def __init__(
        self,
        plan: Plan,
        student: Student,
        teacher: Teacher,
        *,
        signature: Signature,
        vocabulary: int | None,
        ends: Sequence[str],
        adapters: Sequence[str],
    ) -> None:
        super().__init__(plan)
        self.student, self.teacher = student, teacher
        self.signature, self.vocabulary, self.ends, self.adapters = signature, vocabulary, ends, adapters
        self.objective = Objective(plan.options, len(ends))

    def backward(self, number: int) -> LossParts:
        inputs = distributed.shard(self.batches[number], self.rank, self.world)
        targets = self.teacher.targets(number, inputs)
        if self.ends and self.report.steps % self.options.refresh == 0:
            self._refresh(inputs, targets)
        with torch.enable_grad(), self.precision():
            results, known = self.student.run(inputs, self.values())
            logits, outputs = predictions(results, self.signature, self.vocabulary)
            states, adapted = self._states(known)
            parts = self.objective(logits, outputs, states, adapted, targets)
        parts.total.backward()
        return parts

    def _states(self, known: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        return [known[name] for name in self.ends], [known[name] for name in self.adapters]

    def _refresh(self, inputs: Batch, targets: Targets) -> None:
        with torch.no_grad(), self.precision():
            _, known = self.student.run(inputs, self.values())
        self.objective.update_shares(self._states(known)[0], targets)

    def validate(self, values: Mapping[str, Value]) -> float:
        """Mean divergence from the teacher on the held-out batches."""
        losses = []
        with torch.no_grad(), self.precision():
            constants = self.student.prepare(values)
        for number in self.held:
            inputs = distributed.shard(self.batches[number], self.rank, self.world)
            targets = self.teacher.targets(number, inputs)
            with torch.no_grad(), self.precision():
                results, _ = self.student.run_prepared(inputs, constants)
                logits, outputs = predictions(results, self.signature, self.vocabulary)
                if logits is not None:
                    by_token = divergence(logits, targets, self.options.temperature)
                    losses.append(token_mean(by_token, targets.mask))
                else:
                    losses.append(self.objective(None, outputs, [], [], targets).total)
        mean = torch.stack(losses).mean()
        distributed.average([mean])
        return float(mean)

    def extra(self) -> Values:
        return {"final_shares": self.objective.final_shares}

    def restore_extra(self, tensors: Mapping[str, Tensor]) -> None:
        self.objective.final_shares = tensors["final_shares"]
