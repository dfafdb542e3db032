"""Options of calibration: how long, how fast, on what, and what is learned."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

from loopq_compile.errors import LoopQError, did_you_mean

SOLVERS = ("rtn", "gptq", "loaq")
LARGEST_SEED = 2**63 - 1
_SWITCH = ("auto", "on", "off")
_CHOICES = {
    "weight_solver": (*SOLVERS, None),
    "precision": ("float32", "bfloat16"),
    "recompute": _SWITCH,
    "fused": _SWITCH,
}

FUSED_STEPS, FUSED_WEIGHTS = 50, 16 << 20
"""With `fused="auto"`, calibrations of at least this many steps compile their elementwise functions, and so do all
passes over more quantized weights than this."""


@dataclass(frozen=True)
class CalibrationOptions:
    """How a method calibrates; `compile(**options)` takes the fields by name.

    Args:
        steps: optimizer steps of learned methods, summed over all phases; None for the method's default.
        minutes: how long the whole compilation may take, instead of `steps`: a rehearsal measures the passes on this
            machine, and the number of steps is chosen from it.
        seed: of everything random: order of samples, signs of rotations, start of adapters.
        batch_rows: calibration rows (sequences) in a step.
        learning_rate: factor on the learning rates of all parameters; 1 is what was tuned.
        weight_solver: "rtn", "gptq" or "loaq": rounding to nearest, or integers found from second-order statistics;
            None for the method's default.
        statistics_tokens: about how many tokens ranges, smoothing and weight solvers measure, in rows spread evenly
            over the calibration data.
        transition_rank: rank r of the transition adapter's low-rank part (LoopQ eq. 7).
        selection_budget: share of the transform groups inside loops that get separate transforms and weights for each
            loop (LoopQ section 4.2).
        state_weight: lambda, weight of the trajectory loss.
        transition_weight: lambda', weight of the transition loss.
        final_share: upper bound of a_t, the pull of every loop towards the last state; 1 is the paper's.
        refresh: steps between updates of a_t.
        temperature: of teacher and student in the KL divergence.
        top_k: teacher logits kept for each token; the others count as one. None means all up to a vocabulary of 8192,
            else 512.
        validation: share of the calibration batches held out to choose the best state.
        evaluate_every: steps between evaluations on them.
        patience: evaluations without improvement after which calibration stops.
        gradient_clip: largest norm of the gradient.
        precision: "bfloat16" runs matrix products of calibration in bfloat16 where the model is in float32.
        recompute: what is kept for the backward pass: "on" keeps only values between layers, "off" everything; "auto"
            decides by size.
        fused: "on" compiles elementwise functions with torch.compile, which needs a C++ compiler and some seconds;
            "auto" does so for long calibrations and large models.
        checkpoint: folder for checkpoints; a killed calibration resumes from it when it is started again.
        checkpoint_every: steps between checkpoints.

    Raises:
        LoopQError: a value is out of range.
    """

    steps: int | None = None
    minutes: float | None = None
    seed: int = 0
    batch_rows: int = 4
    learning_rate: float = 1.0
    weight_solver: str | None = None
    statistics_tokens: int = 16384
    transition_rank: int = 8
    selection_budget: float = 0.05
    state_weight: float = 0.1
    transition_weight: float = 0.1
    final_share: float = 0.5
    refresh: int = 100
    temperature: float = 1.0
    top_k: int | None = None
    validation: float = 0.125
    evaluate_every: int = 50
    patience: int = 8
    gradient_clip: float = 1.0
    precision: str = "float32"
    recompute: str = "auto"
    fused: str = "auto"
    checkpoint: str | None = None
    checkpoint_every: int = 25

    def __post_init__(self) -> None:
        if self.checkpoint is not None:
            object.__setattr__(self, "checkpoint", os.fspath(self.checkpoint))
        for field in ("batch_rows", "statistics_tokens", "transition_rank", "refresh", "evaluate_every", "patience"):
            _check_count(field, getattr(self, field), 1)
        _check_count("checkpoint_every", self.checkpoint_every, 1)
        _check_count("seed", self.seed, 0, LARGEST_SEED)
        for field in ("steps", "top_k"):
            if getattr(self, field) is not None:
                _check_count(field, getattr(self, field), 1)
        if self.minutes is not None:
            _check_number("minutes", self.minutes, above=0.0)
            if self.steps is not None:
                raise LoopQError(f"steps={self.steps} and minutes={self.minutes:g} exclude each other; leave one out.")
        for field in ("learning_rate", "temperature", "gradient_clip"):
            _check_number(field, getattr(self, field), above=0.0)
        for field in ("state_weight", "transition_weight"):
            _check_number(field, getattr(self, field))
        for field in ("final_share", "selection_budget", "validation"):
            _check_number(field, getattr(self, field), most=1.0)
        for field, choices in _CHOICES.items():
            value = getattr(self, field)
            if value not in choices:
                names = [choice for choice in choices if choice]
                raise LoopQError(f"{field}={value!r} is unknown.{did_you_mean(str(value), names)}")

    def fuses(self, steps: int = 0, weights: int = 0) -> bool:
        """Whether elementwise functions are compiled for something that is done in this many `steps`, or for this many
        quantized `weights`."""
        return self.fused == "on" or (self.fused == "auto" and (steps >= FUSED_STEPS or weights > FUSED_WEIGHTS))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    @staticmethod
    def names() -> frozenset[str]:
        """Names of the fields."""
        return frozenset(field.name for field in dataclasses.fields(CalibrationOptions))


def _check_count(field: str, value: object, least: int, most: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        bound = f" and at most {most}" if most is not None else ""
        raise LoopQError(f"{field} must be an integer of at least {least}{bound}; got {value!r}.")


def _check_number(field: str, value: object, above: float | None = None, most: float | None = None) -> None:
    if isinstance(value, int | float) and not isinstance(value, bool) and value == value:
        low = value > above if above is not None else value >= 0
        if low and (most is None or value <= most) and value != float("inf"):
            return
    bound = f"above {above:g}" if above is not None else "at least 0"
    raise LoopQError(f"{field} must be a number {bound}{f' and at most {most:g}' if most else ''}; got {value!r}.")
