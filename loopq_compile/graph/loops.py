"""Loop structure: which block of a graph runs how often, and the tag that names the loop of a node.

Everything here is plain data. Finding the structure is `loopq_compile.graph.recurrence`; writing it onto a graph is the
pass `tag-loops`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import fx

from loopq_compile.graph.keys import TAG


@dataclass(frozen=True)
class LoopTag:
    """The place of a node: iteration `index[0]` of top-level loop `loops[0]`, in it iteration `index[1]` of that
    loop's child `loops[1]`, and so on. Loops and iterations are counted from 0.
    """

    loops: tuple[int, ...]
    index: tuple[int, ...]

    @property
    def label(self) -> str:
        """`"2"` for the third iteration, `"2.0"` for the first of the loop nested in it."""
        return ".".join(map(str, self.index))

    def __str__(self) -> str:
        beside = ".".join(map(str, self.loops))
        return f"loop={self.label}" + (f" of={beside}" if any(self.loops) else "")


def get_tag(node: fx.Node) -> LoopTag | None:
    """The node's loop tag, None outside every loop."""
    return node.meta.get(TAG)


def set_tag(node: fx.Node, tag: LoopTag | None) -> None:
    """Tags `node`; None removes its tag."""
    if tag is None:
        node.meta.pop(TAG, None)
    else:
        node.meta[TAG] = tag


@dataclass(frozen=True)
class Call:
    """One use of a shared weight: the node that uses it, and the iteration of that node (`"2"`, nested `"2.0"`)."""

    loop: str
    node: str


@dataclass(frozen=True)
class CallSite:
    """All uses of one weight inside a loop, in order. `op` is the operator, `weight` the parameter's name."""

    weight: str
    op: str
    calls: tuple[Call, ...]


@dataclass(frozen=True)
class Boundary:
    """The step from iteration `source` to `target = source + 1`.

    Args:
        state: nodes of iteration `source` whose tensors the next iteration reads: the recurrent state.
        consumers: nodes of iteration `target` that read them.
    """

    source: int
    target: int
    state: tuple[str, ...]
    consumers: tuple[str, ...]


@dataclass(frozen=True)
class Loop:
    """One loop: a block of weights that runs `count` times, each time on the state the previous iteration left.

    Args:
        count: number of iterations, T.
        blocks: the modules (or single weights) that belong to the loop as a whole, as dotted names.
        weights: parameter names of the matrix products that repeat.
        call_sites: uses of every weight inside the loop.
        boundaries: the `count - 1` transitions.
        children: loops nested in one iteration of this one, as they are in its first.
    """

    count: int
    blocks: tuple[str, ...]
    weights: tuple[str, ...]
    call_sites: tuple[CallSite, ...] = ()
    boundaries: tuple[Boundary, ...] = ()
    children: tuple[Loop, ...] = ()

    def describe(self) -> str:
        """Such as `4 x (layers, norm)`, nested `3 x (outer, 2 x (inner))`."""
        parts = [*self.blocks, *(child.describe() for child in self.children)]
        return f"{self.count} x ({', '.join(parts)})"


@dataclass(frozen=True)
class LoopStructure:
    """The loops of a program, the one with most work first; empty for a model without recurrence."""

    loops: tuple[Loop, ...] = ()

    @property
    def main(self) -> Loop | None:
        """The loop that repeats most matrix products; None if nothing repeats."""
        return self.loops[0] if self.loops else None

    @property
    def count(self) -> int:
        """T, the number of iterations of the main loop; 1 if nothing repeats."""
        return self.main.count if self.main else 1

    @property
    def blocks(self) -> tuple[str, ...]:
        """Dotted names of what the loops repeat."""
        return tuple(block for loop in self.walk() for block in loop.blocks)

    @property
    def call_sites(self) -> tuple[CallSite, ...]:
        """Uses of every weight inside a loop."""
        return tuple(site for loop in self.loops for site in loop.call_sites)

    @property
    def boundaries(self) -> tuple[Boundary, ...]:
        """Transitions of the main loop from one iteration to the next."""
        return self.main.boundaries if self.main else ()

    def walk(self) -> Iterator[Loop]:
        """Every loop, parents before children."""
        stack = list(reversed(self.loops))
        while stack:
            loop = stack.pop()
            yield loop
            stack.extend(reversed(loop.children))

    def chain(self, tag: LoopTag | None) -> tuple[Loop, ...]:
        """The loops around a node with this `tag`, outermost first."""
        chain: list[Loop] = []
        siblings = self.loops
        for number in tag.loops if tag else ():
            chain.append(siblings[number])
            siblings = chain[-1].children
        return tuple(chain)

    def iterations(self, tag: LoopTag | None) -> int:
        """Rows that a per-loop table needs for nodes like this one: 1 outside loops, `T * K` in nested ones."""
        return math.prod(loop.count for loop in self.chain(tag))

    def row(self, tag: LoopTag | None) -> int:
        """Row of a per-loop table for this `tag`: the running number of its iteration, nested loops counted fastest."""
        row = 0
        for loop, position in zip(self.chain(tag), tag.index if tag else (), strict=True):
            row = row * loop.count + position
        return row

    def describe(self) -> str:
        """One line for people: `4 x (model.layers, model.norm)`, or `no loop`."""
        return " + ".join(loop.describe() for loop in self.loops) or "no loop"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> LoopStructure:
        """Inverse of `to_dict`."""
        return LoopStructure(tuple(_loop_from_dict(loop) for loop in data["loops"]))


def _loop_from_dict(data: dict[str, Any]) -> Loop:
    return Loop(
        count=int(data["count"]),
        blocks=tuple(data["blocks"]),
        weights=tuple(data["weights"]),
        call_sites=tuple(
            CallSite(site["weight"], site["op"], tuple(Call(**call) for call in site["calls"]))
            for site in data["call_sites"]
        ),
        boundaries=tuple(
            Boundary(edge["source"], edge["target"], tuple(edge["state"]), tuple(edge["consumers"]))
            for edge in data["boundaries"]
        ),
        children=tuple(_loop_from_dict(child) for child in data["children"]),
    )
