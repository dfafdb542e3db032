"""Calibration data: checks a user's data batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from loopq_compile.calibration import distributed
from loopq_compile.calibration.data import regroup
from loopq_compile.capture.surroundings import plain
from loopq_compile.errors import LoopQError, did_you_mean
from loopq_compile.graph.device import CPU
from loopq_compile.graph.signature import Signature
from loopq_compile.graph.texts import text_inputs


def calibration_batches(
    calibration: Any, signature: Signature, vocabulary: int | None, device: torch.device = CPU
) -> Iterator[list[Tensor]]:
    """Yields the graph's inputs for each calibration batch.

    Args:
        calibration: an iterable of token tensors, tuples of positional or dicts of keyword inputs.
        signature: calling convention of the program.
        vocabulary: rows of the embedding, to check token ids; None if unknown.
        device: where the graph lies; batches are moved there.

    Raises:
        LoopQError: this is not an iterable of batches, it is empty, or a batch does not fit the program (the message
            gives its number).
    """
    if isinstance(calibration, Tensor):
        raise LoopQError("calibration must be an iterable of batches; wrap a single tensor in a list: [tensor].")
    if isinstance(calibration, str | bytes | Mapping) or not isinstance(calibration, Iterable):
        raise LoopQError(
            "calibration must be an iterable of token tensors, tuples or dicts of inputs; got "
            f"{type(calibration).__name__}. Tokenize text first."
        )
    number = -1
    for number, batch in enumerate(guarded(calibration)):
        try:
            yield bind_batch(batch, signature, vocabulary, device)
        except LoopQError as error:
            raise LoopQError(f"Calibration batch {number}: {error}") from error
    if number < 0:
        raise LoopQError("calibration is empty: at least one batch is needed (an iterator can be used only once).")


def spread(batches: Sequence[list[Tensor]], tokens: int) -> list[list[Tensor]]:
    """Rows with about this many `tokens` in total, taken evenly from all `batches`, in batches as large as the first.

    Batches without rows (inputs of different lengths) are taken or left as a whole.
    """
    counts = [count_tokens(batch) for batch in batches]
    if sum(counts) <= tokens:
        return list(batches)
    part, seen, taken = tokens / sum(counts), 0.0, 0.0
    found: list[list[Tensor]] = []
    for batch, count in zip(batches, counts, strict=True):
        rows = batch[0].shape[0] if len({tensor.shape[:1] for tensor in batch}) == 1 and batch[0].ndim else 1
        chosen = []
        for row in range(rows):
            if taken <= part * seen:
                chosen.append(row)
                taken += count / rows
            seen += count / rows
        if chosen:
            found.append(batch if len(chosen) == rows else [tensor[chosen] for tensor in batch])
    return regroup(found, batches[0][0].shape[0] if batches[0][0].ndim else 1)


def statistics_batches(
    calibration: Any, signature: Signature, vocabulary: int | None, device: torch.device, tokens: int
) -> list[list[Tensor]]:
    """What this process measures: its share of about `tokens` tokens, spread over all batches.

    Args:
        calibration, signature, vocabulary, device: as in `calibration_batches`.
        tokens: in all processes together.

    Raises:
        LoopQError: as in `calibration_batches`; or there is less text than processes.
    """
    every = list(calibration_batches(calibration, signature, vocabulary, device))
    return distributed.share(spread(every, tokens), device)


def count_rows(batch: Sequence[Tensor]) -> int:
    """Rows of a batch, by its first input."""
    return batch[0].shape[0] if batch[0].ndim else 1


def count_tokens(batch: list[Tensor]) -> int:
    """Tokens in the first input of a batch: ids, or vectors."""
    first = batch[0]
    return first[..., 0].numel() if first.is_floating_point() and first.ndim > 1 else first.numel()


def token_mask(signature: Signature, inputs: Sequence[Tensor]) -> Tensor | None:
    """The attention mask `[batch, sequence]` among the inputs, as numbers; None if there is none."""
    for spec, tensor in zip(signature.inputs, inputs, strict=True):
        if spec.name == "attention_mask" and tensor.ndim == 2:
            return tensor.float()
    return None


def real_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """Activations `[batch, sequence, K]` of the tokens that count, as rows `[n, K]`; padding is left out of statistics.

    Tensors that do not have the mask's `[batch, sequence]` give all their rows.
    """
    if mask is None or x.shape[:-1] != mask.shape:
        return x.reshape(-1, x.shape[-1])
    return x[mask > 0]


def guarded(calibration: Iterable[Any]) -> Iterator[Any]:
    """Yields the batches; errors of the user's own iterator are reported as such."""
    iterator, number = iter(calibration), 0
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            raise LoopQError(
                f"The calibration data failed at batch {number}: {type(error).__name__}: {error}"
            ) from error
        yield batch
        number += 1


def _known_part(batch: Mapping[str, Any], signature: Signature) -> dict[str, Any]:
    """The inputs of the program; extra inputs of tokenizers that do not change the result are accepted and dropped."""
    inputs = {spec.name for spec in signature.inputs}
    for name, value in batch.items():
        if name == "attention_mask" and name not in inputs and isinstance(value, Tensor) and not value.all():
            raise LoopQError(
                "attention_mask masks tokens, but the program was captured without it; give it in example_inputs, or "
                "calibrate without padding."
            )
        if name not in signature.parameters and name not in ("attention_mask", "token_type_ids", "labels"):
            raise LoopQError(f"unknown input {name!r}.{did_you_mean(name, signature.parameters)}")
    return {name: value for name, value in batch.items() if name in inputs or name in signature.constants}


def _beside(ids: Any, signature: Signature, mask: Any = None) -> dict[str, Any]:
    """Token ids with the mask, positions and token types of a text without padding, if the program takes them."""
    named = {signature.parameters[0]: ids}
    if not isinstance(ids, Tensor) or ids.ndim != 2 or signature.parameters[0] != signature.inputs[0].name:
        return named
    return dict(text_inputs(signature, ids, mask))


def bind_batch(
    batch: Any, signature: Signature, vocabulary: int | None = None, device: torch.device = CPU
) -> list[Tensor]:
    """The graph's inputs for one batch: token ids, a tuple of positional or a dict of keyword inputs.

    A missing mask, positions or token types are filled in as for a text without padding.

    Args:
        vocabulary, device: as in `calibration_batches`.

    Raises:
        LoopQError: the batch does not fit the program.
    """
    if isinstance(batch, Mapping):
        known = _known_part(batch, signature)
        ids = known.get(signature.inputs[0].name)
        tensors = signature.bind(
            (), known if ids is None else _beside(ids, signature, known.get("attention_mask")) | known
        )
    elif isinstance(batch, tuple | list) and all(isinstance(item, Tensor) for item in batch):
        tensors = signature.bind(batch, {})
    else:
        tensors = signature.bind((), _beside(batch, signature))
    tensors = [plain(tensor).to(device) for tensor in tensors]
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
