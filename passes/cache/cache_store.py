"""How a key-value cache stores its entries: unchanged, or as integers with scales."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from loopq_compile.errors import LoopQError
from loopq_compile.graph.insert import call
from loopq_compile.graph.signature import PAST
from loopq_compile.operators import ops
from loopq_compile.operators.cache import BITS
from loopq_compile.passes.cache.cache_regions import Regions, shape_of, where

GROUP_SIZE = 32
"""Channels of a head that share a scale at 4 bits."""


@dataclass(frozen=True)
class CacheStore:
    """Keys or values of one attention.

    Args:
        size: channels of a head.
        dtype: of keys and values in the graph.
        bits: 8 or 4; None stores keys and values unchanged.
    """

    size: int
    dtype: torch.dtype
    bits: int | None = None

    def __post_init__(self) -> None:
        if self.bits is not None and self.bits not in BITS:
            raise LoopQError(f"kv_bits must be 8 or 4, or None for a cache in floating point; got {self.bits!r}.")
        if self.bits == 4 and self.size % 2:
            raise LoopQError(f"kv_bits=4 packs two channels into a byte; heads of {self.size} channels are odd.")

    @property
    def group_size(self) -> int:
        """Channels that share a scale: the whole head at 8 bits, 32 at 4 bits if that divides the head."""
        return GROUP_SIZE if self.bits == 4 and self.size % GROUP_SIZE == 0 else self.size

    @property
    def parts(self) -> list[tuple[str, torch.dtype, int]]:
        """The tensors of a cache: the endings of their names, their types and last sizes."""
        if self.bits is None:
            return [("", self.dtype, self.size)]
        codes = ("", torch.int8, self.size) if self.bits == 8 else ("", torch.uint8, self.size // 2)
        return [codes, ("_scale", self.dtype, self.size // self.group_size)]

    def write(self, graph: fx.Graph, value: fx.Node) -> list[fx.Node]:
        """Nodes that make the `parts` of new keys or values."""
        if self.bits is None:
            return [value]
        made = call(graph, ops.quantize_cache.default, value, self.bits, self.group_size)
        return [graph.call_function(operator.getitem, (made, position)) for position in range(2)]

    def read(self, graph: fx.Graph, parts: list[fx.Node]) -> fx.Node:
        """A node that computes the keys or values from `parts`."""
        return parts[0] if self.bits is None else call(graph, ops.dequantize_cache.default, *parts, self.bits)


def cache_shape(regions: Regions, stem: fx.Node) -> tuple[int | str, ...]:
    """The dimensions of a cache for what `stem` computes, by name where they vary.

    Raises:
        LoopQError: keys or values have another layout.
    """
    batch = str(shape_of(regions.ids)[0])
    mask_batch = str(shape_of(regions.mask)[0]) if regions.mask is not None else batch
    shape: list[int | str] = []
    for size in shape_of(stem):
        if regions.carries(size):
            shape.append(PAST)
        elif str(size) in (batch, mask_batch):
            shape.append("batch")
        elif isinstance(size, int):
            shape.append(size)
        else:
            raise LoopQError(
                f"Keys and values must be [batch, heads, sequence, size] to be cached: {where(stem)} is "
                f"{list(shape_of(stem))}."
            )
    return tuple(shape)
