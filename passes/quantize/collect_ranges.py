"""`collect-ranges`: measures the inputs of quantized linears on calibration data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from loopq_compile.calibration import distributed
from loopq_compile.calibration.batches import count_tokens, real_tokens, statistics_batches, token_mask
from loopq_compile.calibration.overflow import cause
from loopq_compile.calibration.ranges import Statistics
from loopq_compile.errors import InternalError, LoopQError
from loopq_compile.graph.device import device_of
from loopq_compile.graph.evaluate import run
from loopq_compile.graph.loops import get_tag
from loopq_compile.graph.state import CompilerState, get_tensor
from loopq_compile.graph.weights import site_calls
from loopq_compile.operators.precision import products_in
from loopq_compile.passes.base import Pass, PassResult
from loopq_compile.progress import progress


class CollectRanges(Pass):
    """Fills `state.run.statistics[group][row]` with statistics of the activations each group reads in each loop.

    Before: linears are annotated. After: the same graph; statistics are measured in one pass over the calibration
    batches. Memory depends on the model, not on the number of batches. Rows are loop iterations, 0 outside loops.

    Does nothing for weight-only schemes, nor for dynamic scales without calibration data (their clip ratios stay 1).

    Tokens hidden by an attention mask do not count. Under `torchrun` every process measures its share.

    Args:
        max_tokens: about how many tokens are measured; None for the option `statistics_tokens`.
    """

    def __init__(self, max_tokens: int | None = None) -> None:
        super().__init__()
        self.max_tokens = max_tokens

    def requires(self, graph_module: fx.GraphModule) -> None:
        state = self.state(graph_module)
        if state.scheme is None or not state.sites:
            raise InternalError("collect-ranges needs annotate-linears before it.")
        if state.scheme.quantizes_activations and state.scheme.activation == "static" and state.run.calibration is None:
            raise LoopQError(
                f"Static activation scales ({state.scheme.name}) need calibration data: calibration=[token "
                "tensors], or Scheme(activation='dynamic')."
            )

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        state = self.state(graph_module)
        assert state.scheme is not None
        if state.run.calibration is None or not state.scheme.quantizes_activations:
            return PassResult(graph_module, False)
        observer = _Observer(graph_module, state)
        vocabulary, device = vocabulary_size(graph_module), device_of(graph_module)
        wanted = self.max_tokens or state.options.statistics_tokens
        batches = statistics_batches(state.run.calibration, state.signature, vocabulary, device, wanted)
        for inputs in progress(batches, "Measuring activations", len(batches)):
            observer.inputs = inputs
            observer.mask = token_mask(state.signature, inputs)
            with products_in(state.options.precision, device):
                run(graph_module, inputs, observer.watch)
        for _, rows in sorted(observer.statistics.items()):
            for _, statistics in sorted(rows.items()):
                statistics.merge()
        tokens = torch.tensor(sum(map(count_tokens, batches)), device=device)
        distributed.total([tokens])
        state.run.statistics = observer.statistics
        state.note(f"{int(tokens)} tokens")
        return PassResult(graph_module, False)


def vocabulary_size(graph_module: fx.GraphModule) -> int | None:
    """Rows of the embedding that reads the token ids; None if there is none."""
    for node in graph_module.graph.nodes:
        if node.target is torch.ops.aten.embedding.default and node.args[1].op == "placeholder":
            return get_tensor(graph_module, str(node.args[0].target)).shape[0]
    return None


class _Observer:
    """Measures what quantized linears read."""

    def __init__(self, graph_module: fx.GraphModule, state: CompilerState) -> None:
        self.graph_module = graph_module
        assert state.scheme is not None
        self.bits, self.size = state.scheme.activation_bits, state.scheme.group_size
        self.limit = state.scheme.limit(self.bits)
        self.statistics: dict[str, dict[int, Statistics]] = {}
        self.inputs: list[Tensor] = []
        self.mask: Tensor | None = None
        self.watched: dict[fx.Node, set[tuple[str, int]]] = {}
        for site, calls in site_calls(graph_module):
            for node in calls:
                self.watched.setdefault(node.args[0], set()).add((site.group, state.loops.row(get_tag(node))))  # type: ignore[arg-type]

    def watch(self, n: fx.Node, value: Any) -> None:
        """Called with every node and its value."""
        for group, row in sorted(self.watched.get(n, ())):
            self._measure(n, value, group, row)

    def _measure(self, node: fx.Node, value: Tensor, group: str, row: int) -> None:
        value = real_tokens(value, self.mask)
        if not torch.isfinite(value).all():
            tag = get_tag(node)
            where = f"{group!r}{f' in {tag}' if tag else ''} (node {node.name!r})"
            reason = cause(self.graph_module, self.inputs)
            raise LoopQError(
                reason
                or f"The input of {where} becomes NaN or infinite on the calibration data, before any quantization."
            )
        size = self.size if self.size != -1 else value.shape[-1]
        rows = self.statistics.setdefault(group, {})
        if row not in rows:
            rows[row] = Statistics.empty(value.shape[-1] // size, value.device)
        if len(value):
            rows[row].update(value, size, self.bits, self.limit)
