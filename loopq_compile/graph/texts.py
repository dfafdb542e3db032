"""What language models read besides token ids, and where their result holds the logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from loopq_compile.errors import LoopQError
from loopq_compile.graph.signature import InputSpec, Signature


def logits_of(output: Any) -> Tensor:
    """Finds the logits `[batch, sequence, vocabulary]` in the result of a model, a program or an ONNX file.

    Raises:
        LoopQError: there is no such tensor.
    """
    found = _logits_in(output)
    if isinstance(found, Tensor) and found.ndim == 2:
        raise LoopQError(
            f"The model returns logits {list(found.shape)}, of one token of each row. Text is scored with those of all "
            "tokens: return logits [batch, sequence, vocabulary]."
        )
    if not isinstance(found, Tensor) or found.ndim != 3:
        raise LoopQError(
            f"The model returns {type(output).__name__} without logits [batch, sequence, vocabulary]; text cannot be "
            "scored or generated with it."
        )
    return found


def last_logits(output: Any, batch: int) -> Tensor:
    """Finds the logits `[batch, vocabulary]` of the last token in the result of a model, a program or an ONNX file.

    A model may return only these (`head(x[:, -1])`), or those of all tokens.

    Raises:
        LoopQError: there is no such tensor.
    """
    return given_logits(output, batch)[:, -1]


def given_logits(output: Any, batch: int) -> Tensor:
    """The logits that a model returns, `[batch, sequence, vocabulary]`; `[batch, 1, vocabulary]` where it gives only
    those of the last token.

    Raises:
        LoopQError: there is no such tensor.
    """
    found = _logits_in(output)
    if isinstance(found, Tensor) and found.ndim == 2 and len(found) == batch:
        return found[:, None]
    return logits_of(output)


def _logits_in(output: Any) -> Any:
    """The value where logits are expected: the output itself, its `logits`, or its first element."""
    found = output
    if not isinstance(found, Tensor):
        found = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    if found is None and isinstance(output, tuple | list) and output:
        found = output[0]
    return found


def text_inputs(signature: Signature, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Inputs of a program by name, from token ids `[batch, sequence]`; all other inputs are derived.

    Args:
        signature: the program's calling convention.
        ids: its first input.
        mask: `[batch, sequence]`, 0 on padding; None means no padding. Positions skip padding.
    """
    first, *others = signature.inputs
    mask = torch.ones(ids.shape[:2], dtype=torch.int64, device=ids.device) if mask is None else mask
    return {first.name: ids} | {spec.name: _made_of(spec, mask) for spec in others if spec.name in MADE_OF_MASK}


MADE_OF_MASK: dict[str, Callable[[Tensor], Tensor]] = {
    "attention_mask": lambda mask: mask,
    "position_ids": lambda mask: (mask.cumsum(1) - 1).clamp_min(0),
    "token_type_ids": torch.zeros_like,
}
"""Inputs that may accompany token ids, computed from the attention mask."""


def _made_of(spec: InputSpec, mask: Tensor) -> Tensor:
    """One row serves all if the program was captured that way, for instance with positions `[1, sequence]`."""
    value = MADE_OF_MASK[spec.name](mask).to(spec.dtype)
    if len(spec.shape) == 1 or spec.shape[0] == 1:
        if not bool((value == value[:1]).all()):
            raise LoopQError(f"This program was captured with {spec}, one row for all: rows cannot differ in padding.")
        value = value[0] if len(spec.shape) == 1 else value[:1]
    return value
