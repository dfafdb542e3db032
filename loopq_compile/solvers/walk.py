"""Runs a graph in stretches over all calibration batches, so that weights can be solved along the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from loopq_compile.graph.device import device_of
from loopq_compile.graph.evaluate import call_node
from loopq_compile.operators.precision import products_in

_SMALL = 1 << 21
"""Bytes up to which a constant is kept; tables of scales are below."""


class Walk:
    """A graph that runs in program order: all batches run up to one node before any goes further.

    Values that will still be read are kept for every batch (in a Transformer, little more than the residual stream);
    all others are dropped. What depends only on stored tensors (weights after inverse transforms and quantization) is
    computed when it is read. Of that, integers and small tensors are kept to the end of a stretch, since a stretch may
    be a whole loop. So the next stretch sees what a pass changed in a chain.

    Args:
        graph_module: the graph; nodes may be inserted into constant chains while it runs.
        batches: the graph's inputs, one list per batch.
        precision: of products along the way, as the calibration option; those of constants run in their own types.
    """

    def __init__(
        self, graph_module: fx.GraphModule, batches: Sequence[Sequence[Tensor]], precision: str = "float32"
    ) -> None:
        self._precision = precision
        self._graph_module = graph_module
        nodes = list(graph_module.graph.nodes)
        inputs = [node for node in nodes if node.op == "placeholder"]
        self._dynamic = set(inputs)
        for node in nodes:
            if any(argument in self._dynamic for argument in node.all_input_nodes):
                self._dynamic.add(node)
        self._plan = [node for node in nodes if node in self._dynamic and node.op != "placeholder"]
        self._position = {node: index for index, node in enumerate(self._plan)}
        self._last_use = {argument: self._position[node] for node in self._plan for argument in node.all_input_nodes}
        self._values: list[dict[fx.Node, Any]] = [dict(zip(inputs, batch, strict=True)) for batch in batches]
        self._constants: dict[fx.Node, Any] = {}
        self._start, self._device = 0, device_of(graph_module)

    def position(self, node: fx.Node) -> int:
        """The position of `node` in program order."""
        return self._position[node]

    def run(self, batch: int, stop: fx.Node) -> None:
        """Runs `batch` from the end of the last stretch up to `stop`, without `stop` itself."""
        values = self._values[batch]
        for index in range(self._start, self._position[stop]):
            node = self._plan[index]
            with products_in(self._precision, self._device):
                values[node] = self._compute(node, values)
            for used in (*node.all_input_nodes, node):
                if self._last_use.get(used, -1) <= index:
                    values.pop(used, None)

    def finish(self, stop: fx.Node) -> None:
        """Ends the stretch when all batches have reached `stop`."""
        self._start = self._position[stop]
        self._constants.clear()

    def value(self, batch: int, node: fx.Node) -> Any:
        """The value of a node that something at or after the current position still reads."""
        return self._values[batch][node] if node in self._dynamic else self.constant(node)

    def apply(self, batch: int, nodes: Sequence[fx.Node], given: dict[fx.Node, Any]) -> Any:
        """The value of the last of `nodes`, computed from the `given` values and those of the walk, which are kept."""
        values = {**self._values[batch], **given}
        for node in nodes:
            values[node] = self._compute(node, values)
        return values[nodes[-1]]

    def constant(self, node: fx.Node) -> Any:
        """The value of a node that depends only on stored tensors."""
        if node not in self._constants:
            if node.op == "get_attr":
                return call_node(self._graph_module, node, self.constant)
            with products_in("float32", self._device):
                value = self._compute(node, {})
            if isinstance(value, Tensor) and value.dtype != torch.int8 and value.nbytes > _SMALL:
                return value
            self._constants[node] = value
        return self._constants[node]

    def _compute(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        def read(argument: fx.Node) -> Any:
            return values[argument] if argument in self._dynamic else self.constant(argument)

        return call_node(self._graph_module, node, read)
