"""Finds loops in an unrolled graph, from the identity of its weights and the order of their uses.

A weight that takes part in several matrix products, each depending on the one before, is *repeated*; its number of
chained uses is its multiplicity (uses side by side, such as a head applied to every loop's state, count once). Weights
repeated in lockstep form the block of one loop. A weight used `T * K` times inside a block that runs `T` times belongs
to a nested loop. Module calls recorded by the exporter (`layers.0@2` is the third call of `layers.0`) are treated like
weights, so that an outer module without weights of its own is found. Apart from that, modules only give names.
Nothing here depends on an architecture.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import fx

_aten = torch.ops.aten
MATRIX_PRODUCTS = {
    _aten.linear.default,
    _aten.addmm.default,
    _aten.mm.default,
    _aten.matmul.default,
    _aten.bmm.default,
    _aten.einsum.default,
    _aten.convolution.default,
    _aten.conv1d.default,
    _aten.conv2d.default,
}
"""Operators whose shared weight makes a loop; shared norms or scalars only do not."""

Token = tuple[str, str]
"""What repeats: `("weight", name)` or `("call", module path)`."""


@dataclass
class Repeat:
    """All uses of one token, as positions in the graph, by iteration: `uses[k]` holds those of chained use `k`."""

    token: Token
    uses: list[list[int]]


@dataclass
class Group:
    """Tokens that repeat in lockstep: one loop of `count` iterations.

    `windows[k]` is the first and last position of iteration `k`; iterations never overlap.
    """

    count: int
    repeats: list[Repeat] = field(default_factory=list)
    windows: list[tuple[int, int]] = field(default_factory=list)

    def try_add(self, repeat: Repeat) -> bool:
        """Adds `repeat` if iterations still follow each other without overlap."""
        if len(repeat.uses) % self.count:
            return False
        spans = [(min(part), max(part)) for part in self.parts(repeat)]
        windows = [
            (min(window[0], span[0]), max(window[1], span[1]))
            for window, span in zip(self.windows or spans, spans, strict=True)
        ]
        if any(left[1] >= right[0] for left, right in pairwise(windows)):
            return False
        self.repeats.append(repeat)
        self.windows = windows
        return True

    def parts(self, repeat: Repeat) -> list[list[int]]:
        """Positions of `repeat` by iteration."""
        size = len(repeat.uses) // self.count
        return [_flat(repeat.uses[k * size : (k + 1) * size]) for k in range(self.count)]

    def is_periodic(self) -> bool:
        """Whether every iteration uses the same tokens in the same order."""
        words: list[list[tuple[int, Token]]] = [[] for _ in range(self.count)]
        for repeat in self.repeats:
            for word, part in zip(words, self.parts(repeat), strict=True):
                word += [(position, repeat.token) for position in part]
        spelled = [[token for _, token in sorted(word)] for word in words]
        return all(word == spelled[0] for word in spelled)

    @property
    def weights(self) -> list[str]:
        """Names of the repeated weights."""
        return [repeat.token[1] for repeat in self.repeats if repeat.token[0] == "weight"]

    @property
    def work(self) -> int:
        """Number of matrix products."""
        return sum(len(_flat(repeat.uses)) for repeat in self.repeats if repeat.token[0] == "weight")

    def nested(self, iteration: int) -> list[Repeat]:
        """What repeats inside one iteration."""
        found = []
        for repeat in self.repeats:
            size = len(repeat.uses) // self.count
            if size > 1:
                found.append(Repeat(repeat.token, repeat.uses[iteration * size : (iteration + 1) * size]))
        return found


def _flat(parts: Iterable[Iterable[int]]) -> list[int]:
    return [item for part in parts for item in part]


def weight_roots(graph: fx.Graph) -> dict[fx.Node, frozenset[str]]:
    """For nodes computed only from weights (`get_attr`, its transposes and casts): the names of those weights."""
    roots: dict[fx.Node, frozenset[str]] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            roots[node] = frozenset([str(node.target)])
        elif node.op == "call_function" and node.all_input_nodes and all(a in roots for a in node.all_input_nodes):
            roots[node] = frozenset().union(*(roots[argument] for argument in node.all_input_nodes))
    return roots


def matrix_weight(node: fx.Node, roots: Mapping[fx.Node, frozenset[str]]) -> str | None:
    """Name of the weight if `node` multiplies data with a weight of at least two dimensions."""
    if node.target not in MATRIX_PRODUCTS or node in roots:
        return None
    for argument in node.all_input_nodes:
        value = argument.meta.get("val")
        if argument in roots and (value is None or value.ndim >= 2):
            return "+".join(sorted(roots[argument]))
    return None


def find_repeats(graph: fx.Graph) -> list[Repeat]:
    """Weights and module calls with at least two chained uses."""
    roots = weight_roots(graph)
    nodes = list(graph.nodes)
    uses: dict[str, list[int]] = defaultdict(list)
    for position, node in enumerate(nodes):
        weight = matrix_weight(node, roots)
        if weight is not None:
            uses[weight].append(position)
    uses = {weight: positions for weight, positions in uses.items() if len(positions) > 1}
    repeats = [
        Repeat(("weight", weight), chained) for weight, chained in _chain(nodes, uses).items() if len(chained) > 1
    ]
    return repeats + _repeated_calls(nodes, {p for repeat in repeats for p in _flat(repeat.uses)})


def _chain(nodes: Sequence[fx.Node], uses: dict[str, list[int]]) -> dict[str, list[list[int]]]:
    """Sorts the uses of each weight by how many uses of the same weight they depend on."""
    column = {weight: i for i, weight in enumerate(uses)}
    weight_at = {position: weight for weight, positions in uses.items() for position in positions}
    depth: dict[fx.Node, np.ndarray] = {}
    zero = np.zeros(len(column), dtype=np.int32)
    chained: dict[str, list[list[int]]] = {weight: [] for weight in uses}
    for position, node in enumerate(nodes):
        inputs = [depth[argument] for argument in node.all_input_nodes]
        here = zero if not inputs else inputs[0] if len(inputs) == 1 else np.maximum.reduce(inputs)
        weight = weight_at.get(position)
        if weight is not None:
            here = here.copy()
            level = int(here[column[weight]])
            here[column[weight]] += 1
            if level == len(chained[weight]):
                chained[weight].append([])
            chained[weight][level].append(position)
        depth[node] = here
    return chained


def module_calls(node: fx.Node) -> list[tuple[str, int]]:
    """`(path, call number)` of the modules around `node`, outermost first, without the root."""
    calls = []
    for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
        if path and not path.startswith("_empty"):
            _, at, number = key.rpartition("@")
            calls.append((path.split("@")[0], int(number) if at and number.isdigit() else 0))
    return calls


def _repeated_calls(nodes: Sequence[fx.Node], used: set[int]) -> list[Repeat]:
    calls: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for position in sorted(used):
        for path, number in module_calls(nodes[position]):
            calls[path][number].append(position)
    return [
        Repeat(("call", path), [[by_number[number][0]] for number in sorted(by_number)])
        for path, by_number in calls.items()
        if len(by_number) > 1
    ]


def group_repeats(repeats: Sequence[Repeat]) -> list[Group]:
    """Loops at one level, the one with most work first. Repeats inside an iteration of a loop are left to that loop."""
    pending = sorted(repeats, key=lambda repeat: (len(repeat.uses), repeat.uses[0][0]))
    groups: list[Group] = []
    while pending:
        group = _grow(pending)
        if not group.repeats:  # uses of the first one lie across each other, however they are counted: not a loop
            pending = pending[1:]
            continue
        pending = [repeat for repeat in pending if not any(repeat is member for member in group.repeats)]
        if group.weights:
            groups.append(group)
    groups.sort(key=lambda group: (-group.work, group.windows[0][0]))
    kept: list[Group] = []
    for group in groups:
        first, last = group.windows[0][0], group.windows[-1][1]
        if all(last < other.windows[0][0] or first > other.windows[-1][1] for other in kept):
            kept.append(group)
    return kept


def _grow(pending: Sequence[Repeat]) -> Group:
    """The group with most work that contains the least repeated token; among equal ones, the one with most iterations.

    That token may repeat `T * K` times in a loop of `T` iterations that consists only of inner loops.
    """
    uses = len(pending[0].uses)
    best = Group(uses)
    for count in [n for n in range(uses, 1, -1) if uses % n == 0]:
        group = _collect(pending, count)
        if not best.repeats or group.work > best.work:
            best = group
        if len(best.repeats) == len(pending):
            break
    return best


def _collect(pending: Sequence[Repeat], count: int) -> Group:
    # Tokens that repeat exactly `count` times come first: they decide where iterations begin and end.
    once = [repeat for repeat in pending if len(repeat.uses) == count]
    several = [repeat for repeat in pending if len(repeat.uses) != count]
    group = Group(count)
    for repeat in [*once, *several]:
        group.try_add(repeat)
    if any(len(repeat.uses) != count for repeat in group.repeats) and not group.is_periodic():
        group = Group(count)
        for repeat in once:
            group.try_add(repeat)
    return group


def common_blocks(weights: Iterable[str], others: Iterable[str]) -> tuple[str, ...]:
    """The largest dotted names that cover `weights` and none of the `others`."""
    weights, taken = list(weights), Counter[str]()
    for other in others:
        parts = other.split(".")
        taken.update(".".join(parts[:i]) for i in range(1, len(parts) + 1))
    blocks: dict[str, None] = {}
    for weight in weights:
        parts = weight.split(".")
        whole = next((p for i in range(1, len(parts) + 1) if not taken[p := ".".join(parts[:i])]), weight)
        blocks[whole] = None
    return tuple(blocks)
