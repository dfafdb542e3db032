"""Which keys and values share a cache: those of a layer in all iterations of its loop, and those of two readers."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch import fx

from loopq_compile.errors import LoopQError
from loopq_compile.graph.loops import get_tag
from loopq_compile.passes.cache.attention import Attention, Source
from loopq_compile.passes.cache.cache_regions import where


@dataclass(frozen=True)
class Pair:
    """Keys and values that are cached together, `[batch, heads, sequence, size]` each."""

    key: fx.Node
    value: fx.Node

    def part(self, kind: str) -> fx.Node:
        """The node of `kind`, "key" or "value"."""
        return self.key if kind == "key" else self.value


@dataclass
class Slot:
    """The cache of one pair or, if `loop` is a number, of the pairs of all iterations of a loop, one in each row."""

    pairs: list[Pair]
    loop: int | None = None


def find_pairs(attention: list[Attention], sources: dict[tuple[fx.Node, str], Source]) -> list[Pair]:
    """The pairs that attention reads, in order, each one once: a later pass may read what an earlier one has read.

    Raises:
        LoopQError: an attention joins keys in a different way than values.
    """
    found: dict[Pair, None] = {}
    for reader in attention:
        keys, values = (sources[reader.node, kind].stems for kind in ("key", "value"))
        if len(keys) != len(values):
            raise LoopQError(
                f"This model cannot have a key-value cache: {where(reader.node)} reads {len(keys)} sequences of keys "
                f"and {len(values)} of values. Use cache=False."
            )
        found.update(dict.fromkeys(map(Pair, keys, values)))
    return list(found)


def find_slots(pairs: list[Pair], counts: list[int], stacked: bool) -> list[Slot]:
    """The caches for `pairs`; `counts` are the iterations of every loop. `stacked`: one cache for a loop's
    iterations."""
    if not stacked:
        return [Slot([pair]) for pair in pairs]
    slots: dict[Any, list[Pair]] = {}
    seen: dict[Any, int] = defaultdict(int)
    for number, pair in enumerate(pairs):
        tag = get_tag(pair.key)
        key: Any = (None, number)
        if tag is not None and get_tag(pair.value) == tag:
            iteration = (tag.loops[0], tag.index[0])
            key = (tag.loops[0], seen[iteration])
            seen[iteration] += 1
        slots.setdefault(key, []).append(pair)
    found: list[Slot] = []
    for (loop, _), group in slots.items():
        if loop is not None and len(group) == counts[loop] and len({_kind(pair) for pair in group}) == 1:
            found.append(Slot(group, loop))
        else:
            found += [Slot([pair]) for pair in group]
    return found


def _kind(pair: Pair) -> tuple[str, ...]:
    """Types and shapes: rows of one cache are alike."""
    return tuple(f"{node.meta['val'].dtype} {list(node.meta['val'].shape)}" for node in (pair.key, pair.value))
