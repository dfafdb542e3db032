"""How close the transforms of a program are to having no inverse."""

from __future__ import annotations

import torch
from torch import fx

from loopq_compile.errors import LoopQError
from loopq_compile.graph.state import get_tensor
from loopq_compile.passes.transforms.tables import group_tables

LARGEST_CONDITION = 1e6
"""Transforms beyond this condition number count as singular: in single precision their inverse is noise."""


def condition_numbers(graph_module: fx.GraphModule) -> dict[str, float]:
    """By group, the largest condition number of its transform over all loops.

    Raises:
        LoopQError: a transform cannot be inverted, or holds NaN or infinite values; the message names the group and the
            loop.
    """
    return {group: _condition(graph_module, group, parts) for group, parts in group_tables(graph_module).items()}


def _condition(graph_module: fx.GraphModule, group: str, parts: dict[str, fx.Node]) -> float:
    worst = 1.0
    tables = {part: get_tensor(graph_module, str(node.target)).detach() for part, node in parts.items()}
    for row in range(max(len(table) for table in tables.values())):
        product = 1.0
        for part, table in tables.items():
            value = table[min(row, len(table) - 1)].double()
            finite = bool(value.isfinite().all())
            stretch = value.abs() if part == "diagonal" else torch.linalg.svdvals(value) if finite else value
            ratio = float(stretch.max() / stretch.min()) if finite else float("nan")
            if not ratio < (float("inf") if part == "diagonal" else LARGEST_CONDITION):
                where = f", row {row} of {len(table)} (loop {row})" if len(table) > 1 else ""
                what = f"cannot be inverted (condition {ratio:.3g})" if finite else "holds NaN or infinite values"
                raise LoopQError(
                    f"The transform ({part}) of {group!r}{where} {what}. Calibrate with a lower learning rate or other "
                    "data, or leave the group out of the transforms."
                )
            product *= ratio
        worst = max(worst, product)
    return worst
