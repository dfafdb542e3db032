"""Calls of programs that may stop their loop early (pass `exit-early`): one more input and one more result."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loopq_compile.errors import LoopQError
from loopq_compile.graph.signature import Signature

EXIT_THRESHOLD = "exit_threshold"
"""Input without dimensions: the loop stops when every new token's probability to have stopped reaches it."""
LOOPS_SPENT = "loops_spent"
"""Result without dimensions: how many iterations ran."""


def has_early_exit(signature: Signature) -> bool:
    """Whether a program takes a threshold."""
    return any(spec.name == EXIT_THRESHOLD for spec in signature.inputs)


def threshold_tensor(value: Any) -> Tensor:
    """`value` as the input `exit_threshold`; None means 1, which runs all loops.

    Raises:
        LoopQError: it is not a number above 0.
    """
    if value is None:
        return torch.ones(())
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise LoopQError(
            f"{EXIT_THRESHOLD} must be a probability above 0, such as 0.9; from 1 on all loops run; got {value!r}."
        )
    return torch.tensor(float(value), dtype=torch.float32)


def check_early_exit(signature: Signature, threshold: Any) -> None:
    """Refuses a threshold where the program cannot stop early.

    Raises:
        LoopQError: it cannot; the message says what to do.
    """
    if threshold is not None and not has_early_exit(signature):
        raise LoopQError(
            f"{EXIT_THRESHOLD}={threshold!r}: this program runs all its loops. Make one that can stop early with "
            "program.with_early_exit(), or a file with program.export_onnx(..., form='rolled', early_exit=True)."
        )


def spent_of(output: Any) -> list[int]:
    """The number of loops that a call ran, as a list of one entry; [] for programs that always run all."""
    spent = output.get(LOOPS_SPENT) if isinstance(output, dict) else None
    return [] if spent is None else [int(spent)]
