"""Key-value caches among the inputs and outputs of a program: their names and shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from loopq_compile.graph.signature import LOOPS_AXIS, PAST, InputSpec, Signature

PAST_PREFIX, PRESENT_PREFIX = "past_key_values.", "present."
"""Prefix of the names of cache inputs and outputs; a number and `.key` or `.value` follow."""
STATE_PREFIX = "state."
"""Prefix of the tensors that the first loops of a program hand to the other ones; a number follows."""


def has_cache(signature: Signature) -> bool:
    """Whether a program takes keys and values of earlier calls."""
    return any(spec.name.startswith(PAST_PREFIX) for spec in signature.inputs)


def cache_inputs(signature: Signature) -> tuple[InputSpec, InputSpec, list[InputSpec]]:
    """Token ids, attention mask and cache inputs of a program with a key-value cache."""
    ids, mask, *others = signature.inputs
    return ids, mask, [spec for spec in others if spec.name.startswith(PAST_PREFIX)]


def present_name(name: str) -> str:
    """The output whose value the input `name` takes in the next call."""
    return PRESENT_PREFIX + name.removeprefix(PAST_PREFIX)


def empty_cache(spec: InputSpec, batch: int, loops: int) -> Tensor:
    """The cache before the first token."""
    sizes = {"batch": batch, PAST: 0, LOOPS_AXIS: loops}
    return torch.zeros([sizes[size] if isinstance(size, str) else size for size in spec.shape], dtype=spec.dtype)
