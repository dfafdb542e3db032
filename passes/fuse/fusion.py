"""The patterns that fusing passes look for, and the report of what they found.

In every loop, these operators come before a group of quantized linears:

    x ─▶ [norm | activation(·) [* up]] ─▶ [mul(·, diagonal[t])] ─▶ [kronecker(·, left[t], right[t])] ─▶ quantize ─▶ …

The scale is static, a row of a table, or `dynamic_scale` with a row of clip ratios. `match_activation` reads this
backwards from the quantize node, takes what fits one kernel, and says why the rest stays outside.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from loopq_compile.graph.keys import SITE
from loopq_compile.graph.loops import get_tag
from loopq_compile.graph.state import get_state, get_tensor
from loopq_compile.operators import ops
from loopq_compile.passes.fuse.producers import Front, match_front

_aten = torch.ops.aten
RESULTS = "fusion"
"""Key in `state.results` for the report, a list of `Entry` as plain values."""


@dataclass(frozen=True)
class Limits:
    """What one kernel can do.

    Args:
        group_sizes: features per scale.
        widest: features of a token without a transform.
        widest_factored: size of the tile of a transform, with its sides rounded up to powers of two.
        longest_side: longest side of such a tile.
    """

    group_sizes: tuple[int, ...] = (32, 64, 128)
    widest: int = 16384
    widest_factored: int = 8192
    longest_side: int = 256


@dataclass(frozen=True)
class Entry:
    """One line of the report: what became one kernel, or what did not and why.

    Args:
        node: name of the node in the program's graph.
        loop: label of its iteration, empty outside loops.
        site: group or linear.
        parts: what was fused, such as `("rms_norm", "kronecker", "quantize")`; empty if nothing was.
        reason: why the node, or what comes before it, stays unchanged; empty if all was fused.
    """

    node: str
    loop: str
    site: str
    parts: tuple[str, ...] = ()
    reason: str = ""

    def __str__(self) -> str:
        where = f"{self.node} (loop={self.loop})" if self.loop else self.node
        what = " + ".join(self.parts) if self.parts else "not fused"
        return f"{where} {self.site}: {what}" + (f"; {self.reason}" if self.reason else "")


class Refusal(Exception):
    """A pattern does not match; the message is the reason in the report."""


@dataclass
class Activation:
    """What one kernel computes before linears: the arguments of `loopq::quantize_packed`, as nodes and numbers."""

    quantize: fx.Node
    x: fx.Node
    table: fx.Node
    group_size: int
    bits: int
    limit: int
    front: Front | None = None
    diagonal: fx.Node | None = None
    left: fx.Node | None = None
    right: fx.Node | None = None
    loop: int = 0
    parts: list[str] = field(default_factory=list)
    reason: str = ""

    def arguments(self) -> tuple[Any, ...]:
        """The arguments in the order of the operator."""
        front = self.front or Front(self.x, "", set())
        before = (front.up, front.activation, front.norm, front.gain, front.shift, front.eps)
        tables = (self.diagonal, self.left, self.right, self.table)
        return (self.x, *before, *tables, self.loop, self.group_size, self.bits, self.limit)


def record(graph_module: fx.GraphModule, entries: list[Entry]) -> None:
    """Adds `entries` to the report of the graph, and a line about how much was fused to the log."""
    state = get_state(graph_module)
    state.results.setdefault(RESULTS, []).extend(asdict(entry) for entry in entries)
    fused = sum(bool(entry.parts) for entry in entries)
    if entries:
        state.note(f"{fused} of {len(entries)} places fused")


def entry(node: fx.Node, parts: tuple[str, ...] = (), reason: str = "") -> Entry:
    """A line of the report about `node`."""
    tag = get_tag(node)
    return Entry(node.name, tag.label if tag else "", node.meta.get(SITE, ""), parts, reason)


def match_activation(graph_module: fx.GraphModule, quantize: fx.Node, limits: Limits) -> Activation:
    """Finds what can share one kernel with `quantize`.

    Raises:
        Refusal: not even the quantize node fits a kernel.
    """
    x, scale, group_size, _, q_max = quantize.args
    if group_size not in limits.group_sizes:
        raise Refusal(f"groups of {group_size}; kernels have {', '.join(map(str, limits.group_sizes))}")
    limit: Any = 0
    rows: list[tuple[int, int]] = []
    if scale.target is ops.dynamic_scale.default:  # type: ignore[union-attr]
        if scale.args[0] is not x or any(user.args[1] is not scale for user in scale.users):  # type: ignore[union-attr]
            raise Refusal("its scale is that of another tensor")
        scale, limit = scale.args[1], scale.args[3]  # type: ignore[union-attr]
    table = _row(graph_module, scale, rows)
    if table is None:
        raise Refusal("its scale is not the row of a table")
    value = x.meta.get("val")  # type: ignore[union-attr]
    if not isinstance(value, Tensor) or value.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise Refusal(f"kernels compute in float32, bfloat16 and float16, not {getattr(value, 'dtype', 'this')}")
    width = value.shape[-1]
    if width > limits.widest:
        raise Refusal(f"{width} features; a kernel holds {limits.widest}")
    bits = int(q_max).bit_length() + 1  # type: ignore[arg-type]
    found = Activation(quantize, x, table, group_size, bits, limit)  # type: ignore[arg-type]
    own = {quantize, quantize.args[1]}
    _match_transform(graph_module, found, own, rows, limits)
    if not found.reason:
        _take_front(found, own)
    found.parts.append("quantize" if not limit else "dynamic quantize")
    found.loop = _common_loop(graph_module, quantize, rows)
    return found


def _match_transform(
    graph_module: fx.GraphModule, found: Activation, own: set[Any], rows: list[tuple[int, int]], limits: Limits
) -> None:
    """Takes the transform and the diagonal before it into `found`, if they fit."""
    if found.x.target is ops.kronecker.default and _is_private(found, found.x, own):
        x, *factors = found.x.args
        chosen: list[tuple[int, int]] = []
        tables = [_row(graph_module, factor, chosen) for factor in factors]
        sizes = [factor.meta["val"].shape[-1] for factor in factors]  # type: ignore[union-attr]
        tile = [1 << max(4, (size - 1).bit_length()) for size in sizes]
        if sizes[1] == 1:
            found.reason = f"the transform is a full matrix of {sizes[0]} x {sizes[0]}"
        elif tile[0] * tile[1] > limits.widest_factored or max(tile) > limits.longest_side:
            found.reason = f"the transform of {sizes[0]} x {sizes[1]} needs a tile of {tile[0]} x {tile[1]}"
        elif None in tables or chosen[0] != chosen[1]:
            found.reason = "its transform is not one row of tables"
        else:
            own.add(found.x)
            found.x, (found.left, found.right) = x, tables  # type: ignore[assignment]
            rows.extend(chosen)
            found.parts.insert(0, "kronecker")
    if not found.reason and found.x.target is _aten.mul.Tensor and _is_private(found, found.x, own):
        for x, factor in (found.x.args, found.x.args[::-1]):
            chosen = []
            table = _row(graph_module, factor, chosen)
            if table is not None and isinstance(x, fx.Node):
                own.add(found.x)
                found.x, found.diagonal = x, table
                rows.extend(chosen)
                found.parts.insert(0, "diagonal")
                break


def _take_front(found: Activation, own: set[Any]) -> None:
    """Takes the norm or the activation function before it into `found`."""
    front = match_front(found.x)
    if front is None:
        found.reason = f"before it is {_describe(found.x)}, which no kernel takes in"
    elif all(_is_private(found, node, own | front.nodes) for node in front.nodes):
        found.x, found.front = front.x, front
        found.parts.insert(0, front.part)


def _describe(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_function" else node.op


def _is_private(found: Activation, node: fx.Node, own: set[Any]) -> bool:
    """Whether only fused nodes read `node`; otherwise records the reason."""
    others = [user.name for user in node.users if user not in own]
    if others and not found.reason:
        found.reason = f"{node.name} is also read by {', '.join(others)}"
    return not others


def _row(graph_module: fx.GraphModule, node: Any, rows: list[tuple[int, int]]) -> fx.Node | None:
    """The stored table of which `node` is a row, else None; adds `(index, number of rows)` to `rows`."""
    if not isinstance(node, fx.Node) or node.target is not _aten.select.int or node.args[1] != 0:
        return None
    table, _, index = node.args
    if not isinstance(table, fx.Node) or table.op != "get_attr" or not isinstance(index, int):
        return None
    rows.append((index, get_tensor(graph_module, str(table.target)).shape[0]))
    return table


def _common_loop(graph_module: fx.GraphModule, node: fx.Node, rows: list[tuple[int, int]]) -> int:
    """The number that selects the row in all tables: shared tables have one row, the others one for every loop.

    Raises:
        Refusal: there is none.
    """
    own = get_state(graph_module).loops.row(get_tag(node))
    for loop in (own, max(index for index, _ in rows)):
        if all(index == min(loop, count - 1) for index, count in rows):
            return loop
    raise Refusal(f"its tables are read at different rows: {', '.join(str(index) for index, _ in rows)}")
