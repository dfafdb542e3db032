"""Time and memory of a compilation on a machine that is not here, by formula.

A step costs products, memory traffic and kernel launches:

    products  (4 + teacher) * 2 * weights * calls * tokens, and as many for the head
    traffic   weights * (12 * calls + 100) bytes: each product makes its weight from integers, forward, again, and
              backward; once a step the chain from stored to quantized weights runs, and its gradient.
              8 bytes for every byte of values between operators
    launches  3 * 10 µs for every node

Half of the stated rates are assumed to be reached. Nothing of this was compared with a GPU.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from loopq_compile.errors import LoopQError
from loopq_compile.graph.options import CalibrationOptions
from loopq_compile.passes.learn.calibrate import Calibrate
from loopq_compile.passes.learn.requirements import Work, check_fits, kind_of
from loopq_compile.passes.learn.select_transforms import SEQUENCES
from loopq_compile.pipeline import Pipeline, pass_name
from loopq_compile.planning.costs import Cost

_REACHED = 0.5
_LAUNCH = 1e-5
_COLUMN_LAUNCHES = 20
"""Kernels that the solver starts for every column of a weight, refinement included."""
_UNITS = {"GIB": 2.0**30, "GB": 1e9, "TFLOPS": 1e12, "GFLOPS": 1e9, "TB/S": 1e12, "GB/S": 1e9}


@dataclass(frozen=True)
class Machine:
    """A processor with its memory.

    Args:
        memory: bytes.
        flops: operations in a second of dense products in the type that calibration uses.
        bandwidth: bytes in a second, of its memory.
    """

    memory: float
    flops: float
    bandwidth: float

    @staticmethod
    def parse(text: str) -> Machine:
        """Reads `"32GiB,105TFLOPS,1.79TB/s"`: memory, rate of products, bandwidth of memory.

        Raises:
            LoopQError: the text has another form.
        """
        found: dict[str, float] = {}
        for part in text.split(","):
            match = re.fullmatch(r"([0-9.]+)(GI?B|[TG]FLOPS|[TG]B/S)", part.strip().upper().replace(" ", ""))
            if match and re.fullmatch(r"[0-9]+\.?[0-9]*", match[1]) and float(match[1]) > 0:
                kind = "bandwidth" if "/" in match[2] else "flops" if "FLOPS" in match[2] else "memory"
                found[kind] = float(match[1]) * _UNITS[match[2]]
        if len(found) != 3 or text.count(",") != 2:
            raise LoopQError(
                f"--machine takes memory, rate of products and bandwidth of memory, such as 32GiB,105TFLOPS,1.79TB/s; "
                f"got {text!r}."
            )
        return Machine(**found)

    def __str__(self) -> str:
        return f"{self.memory / 2**30:.4g} GiB, {self.flops / 1e12:.4g} TFLOPS and {self.bandwidth / 1e12:.4g} TB/s"

    def step(self, work: Work, tokens: int, products: float, chains: float = 1.0) -> float:
        """Seconds of one step.

        Args:
            work: of the model.
            tokens: in the step.
            products: how many times the model's products are computed; the backward pass counts as two.
            chains: how often each chain from a stored to a quantized weight runs.
        """
        share = tokens / work.tokens
        flops = 2 * products * tokens * (work.weights * work.calls + work.width * work.outputs)
        traffic = work.weights * (12 * work.calls + 100 * chains) + 8 * (work.values + work.logits) * share
        return flops / (_REACHED * self.flops) + traffic / (_REACHED * self.bandwidth) + 3 * _LAUNCH * work.nodes


def predict(
    work: Work, pipeline: Pipeline, options: CalibrationOptions, tokens: int, machine: Machine, model_bytes: int
) -> list[Cost]:
    """Time and peak memory of the passes that learn, in their order; the others take little.

    Args:
        work: of the model.
        pipeline, options: as for `loopq_compile.compile`.
        tokens: of all calibration batches.
        machine: where it shall run.
        model_bytes: size of the model, which lies there too.

    Raises:
        LoopQError: it would not fit there, or the method learns nothing.
    """
    memory = work.phases(pipeline, options)
    check_fits(work, list(pipeline), options, round(machine.memory) - model_bytes)
    costs = []
    for item in pipeline:
        kind = kind_of(item, options)
        if kind is not None:
            costs.append(Cost(pass_name(item), _seconds(item, kind, work, options, tokens, machine), memory[kind]))
    if not costs:
        raise LoopQError(
            f"Method {pipeline.name!r} learns nothing, so there is no cost to predict for another machine."
        )
    return costs


def _seconds(item: object, kind: str, work: Work, options: CalibrationOptions, tokens: int, machine: Machine) -> float:
    if kind == "selection":
        rows = min(SEQUENCES, max(1, tokens // work.length))
        return rows * machine.step(work, work.length, 5, work.calls)
    if kind == "solver":
        return _solver_seconds(work, min(tokens, item.max_tokens or options.statistics_tokens), machine)  # type: ignore[attr-defined]
    steps = item.steps(options) if isinstance(item, Calibrate) else options.steps or item.default_steps  # type: ignore[attr-defined]
    held = max(1, round(tokens / work.tokens * options.validation))
    evaluations = 1 + math.ceil(steps / options.evaluate_every)
    return steps * machine.step(work, work.tokens, 5) + evaluations * held * machine.step(work, work.tokens, 1)


def _solver_seconds(work: Work, seen: int, machine: Machine) -> float:
    walks = machine.step(work, seen, 1) * (1 + 1 / max(1.0, work.calls))
    cubes = sum(12.0 * width**3 + 8.0 * outputs * width**2 for outputs, width in work.shapes)
    launches = _LAUNCH * _COLUMN_LAUNCHES * sum(width for _, width in work.shapes)
    return walks + (cubes + 2 * work.squares * work.calls * seen) / (_REACHED * machine.flops) + launches
