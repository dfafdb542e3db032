"""`set-ranges`: turns statistics into scales and clip ratios."""

from __future__ import annotations

import torch
from torch import fx

from loopq_compile.calibration.ranges import Statistics, dynamic_clip, static_range
from loopq_compile.errors import InternalError
from loopq_compile.graph.keys import GROUP
from loopq_compile.graph.scheme import Scheme, quantized_range
from loopq_compile.graph.state import get_tensor, set_tensor
from loopq_compile.operators.quantize import bounded
from loopq_compile.passes.base import Pass, PassResult


class SetRanges(Pass):
    """Fills the tables of activation scales and clip ratios.

    Before: tables of ones, and statistics of every group and loop. After: row `t` is the range of loop `t`; a table
    with one row covers the statistics of all loops together.

    Does nothing for dynamic scales without statistics: clip ratios stay 1.

    Args:
        clip: False leaves clip ratios of dynamic scales at 1, for engines that round activations themselves.
    """

    def __init__(self, clip: bool = True) -> None:
        super().__init__()
        self.clip = clip

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        state = self.state(graph_module)
        scheme = state.scheme
        tables = [node for node in graph_module.graph.nodes if GROUP in node.meta]
        if scheme is None or not tables:
            return PassResult(graph_module, False)
        if scheme.activation == "dynamic" and not (self.clip and state.run.statistics):
            return PassResult(graph_module, False)
        for table in tables:
            group = table.meta[GROUP]
            measured = state.run.statistics.get(group)
            if not measured:
                raise InternalError(f"set-ranges: no statistics for {group!r}; collect-ranges must come before.")
            old = get_tensor(graph_module, str(table.target))
            values = torch.stack([self._row(scheme, measured, row, old.shape[0]) for row in range(old.shape[0])])
            values = values.to(old.dtype)
            set_tensor(graph_module, str(table.target), bounded(values) if scheme.activation == "static" else values)
        return PassResult(graph_module, True)

    def _row(self, scheme: Scheme, measured: dict[int, Statistics], row: int, rows: int) -> torch.Tensor:
        statistics = measured[row] if rows > 1 else _merge(list(measured.values()))
        if scheme.activation_granularity == "tensor":
            statistics = statistics.pooled()
        if scheme.activation == "dynamic":
            return dynamic_clip(statistics)
        alpha = static_range(statistics, scheme.activation_bits, scheme.activation_range, scheme.percentile)
        return alpha / quantized_range(scheme.activation_bits)[1]


def _merge(parts: list[Statistics]) -> Statistics:
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.merged(part)
    return whole
