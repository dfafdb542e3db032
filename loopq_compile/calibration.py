"""Calibration data: checking what a user hands in, batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from loopq_compile.errors import LoopQError
from loopq_compile.signature import Signature


def calibration_batches(calibration: Any, signature: Signature, vocabulary: int | None) -> Iterator[list[Tensor]]:
    """Yields the graph's inputs for each calibration batch.

    Args:
        calibration: an iterable of token tensors, tuples of positional or dicts of keyword inputs.
        signature: calling convention of the program.
        vocabulary: rows of the embedding, to check token ids; None if unknown.

    Raises:
        LoopQError: not an iterable of batches, a batch does not fit the program (its number is named), or no batch.
    """
    if isinstance(calibration, Tensor):
        raise LoopQError("calibration must be an iterable of batches; wrap a single tensor in a list: [tensor].")
    if isinstance(calibration, str | bytes | Mapping) or not isinstance(calibration, Iterable):
        raise LoopQError(
            "calibration must be an iterable of token tensors, tuples or dicts of inputs; got "
            f"{type(calibration).__name__}. Tokenize text first."
        )
    number = -1
    for number, batch in enumerate(calibration):
        try:
            yield _bind(batch, signature, vocabulary)
        except LoopQError as error:
            raise LoopQError(f"Calibration batch {number}: {error}") from error
    if number < 0:
        raise LoopQError("calibration is empty: at least one batch is needed (an iterator can be used only once).")


def _bind(batch: Any, signature: Signature, vocabulary: int | None) -> list[Tensor]:
    if isinstance(batch, Mapping):
        known = {name: value for name, value in batch.items() if name in signature.parameters}
        tensors = signature.bind((), known)
    elif isinstance(batch, tuple | list):
        tensors = signature.bind(batch, {})
    else:
        tensors = signature.bind((batch,), {})
    for spec, tensor in zip(signature.inputs, tensors, strict=True):
        if tensor.is_floating_point():
            if not torch.isfinite(tensor).all():
                raise LoopQError(f"input {spec.name!r} contains NaN or infinite values.")
        elif vocabulary is not None and spec.name == "input_ids" and tensor.numel():
            low, high = int(tensor.min()), int(tensor.max())
            if low < 0 or high >= vocabulary:
                raise LoopQError(
                    f"token ids run from {low} to {high}, the model's vocabulary from 0 to {vocabulary - 1}."
                )
    return tensors
