"""Time and memory of a compilation for any number of steps, from what a rehearsal measured."""

from __future__ import annotations

from dataclasses import dataclass, replace

from loopq_compile.calibration.target_store import MEMORY_BYTES
from loopq_compile.graph.options import CalibrationOptions
from loopq_compile.passes.learn.calibrate import Calibrate
from loopq_compile.passes.learn.calibrate_blocks import CalibrateBlocks
from loopq_compile.pipeline import pass_name


@dataclass(frozen=True)
class Cost:
    """What a pass is predicted to need.

    Args:
        name: of the pass.
        seconds: its time.
        memory: peak of the process, or of the GPU, while it runs, beyond what lay there before the first pass, in
            bytes.
    """

    name: str
    seconds: float
    memory: int


@dataclass(frozen=True)
class Learning:
    """Measured parts of one phase of calibration: seconds, except for `memory` and `target`, in bytes.

    Args:
        setup: to make teacher and student, and what the first step takes longer than the second.
        ask: the teacher's answer on one batch.
        target: size of that answer.
        step: one step, without the teacher.
        evaluation: one evaluation on all batches held out.
        memory: peak, with the answers on the batches of the rehearsal.
    """

    setup: float
    ask: float
    target: int
    step: float
    evaluation: float
    memory: int


@dataclass(frozen=True)
class Phase:
    """A pass whose time depends on the number of steps, and what it took; None if it has nothing to learn."""

    item: Calibrate | CalibrateBlocks
    found: Learning | None


@dataclass(frozen=True)
class Rehearsed:
    """What a rehearsal measured.

    Args:
        parts: one for every pass, in their order.
        options: of the calibration.
        learn, held: numbers of all batches to learn from, and of those held out.
    """

    parts: tuple[Cost | Phase, ...]
    options: CalibrationOptions
    learn: int
    held: int

    @property
    def phases(self) -> list[Phase]:
        """Phases that learn something."""
        return [part for part in self.parts if isinstance(part, Phase) and part.found is not None]

    def seconds(self, steps: int) -> float:
        """The time of all passes with this many steps; more steps never take less."""
        return sum(cost.seconds for cost in self.costs(steps))

    def costs(self, steps: int | None = None) -> list[Cost]:
        """What every pass needs.

        Args:
            steps: as the option of that name; None for the number in the options, or the method's default.
        """
        options = replace(self.options, steps=steps or self.options.steps, minutes=None)
        asked, costs = 0, []
        for part in self.parts:
            if isinstance(part, Cost):
                costs.append(part)
                continue
            if isinstance(part.item, Calibrate):
                asked, before = max(asked, self._answers(part.item, options)), asked
                costs.append(self._phase(part.item, part.found, options, before))
            else:
                costs.append(_blocks(part.item, part.found, options))
        return costs

    def _answers(self, item: Calibrate, options: CalibrationOptions) -> int:
        """How many batches a phase needs the teacher's answers on."""
        return min(item.steps(options), self.learn) + self.held

    def _phase(self, item: Calibrate, found: Learning | None, options: CalibrationOptions, asked: int) -> Cost:
        """One phase of `calibrate`, after phases that asked the teacher about `asked` batches."""
        if found is None:
            return Cost(pass_name(item), 0.0, 0)
        steps, batches = item.steps(options), self._answers(item, options)
        evaluations = 1 + -(-steps // options.evaluate_every)
        answers = min(MEMORY_BYTES, found.target * max(0, batches - 2))
        seconds = found.setup + found.step * steps + found.evaluation * evaluations
        return Cost(pass_name(item), seconds + found.ask * max(0, batches - asked), found.memory + answers)


def _blocks(item: CalibrateBlocks, found: Learning | None, options: CalibrationOptions) -> Cost:
    if found is None:
        return Cost(pass_name(item), 0.0, 0)
    return Cost(pass_name(item), found.setup + found.step * (options.steps or item.default_steps), found.memory)
