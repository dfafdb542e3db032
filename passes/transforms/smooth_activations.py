"""`smooth-activations`: moves outlier channels from activations into weights (SmoothQuant, Xiao et al. 2023)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from loopq_compile.calibration import distributed
from loopq_compile.calibration.batches import real_tokens, statistics_batches, token_mask
from loopq_compile.errors import InternalError, LoopQError
from loopq_compile.graph.device import device_of
from loopq_compile.graph.evaluate import run
from loopq_compile.graph.loops import get_tag
from loopq_compile.graph.state import get_tensor
from loopq_compile.graph.weights import weight_chain
from loopq_compile.operators.precision import products_in
from loopq_compile.passes.base import Pass, PassResult
from loopq_compile.passes.quantize.collect_ranges import vocabulary_size
from loopq_compile.passes.transforms.fold_diagonals import Gain, find_gain
from loopq_compile.passes.transforms.tables import (
    Use,
    add_table,
    group_tables,
    group_uses,
    insert_diagonal,
    table_type,
    weight_type,
)
from loopq_compile.progress import progress

SCALE_RANGE = 1e-5, 1e5
"""Bounds of smoothing factors, so that weights of channels that are almost always zero do not vanish. In float16, the
factor and its inverse must also be normal numbers of that type."""


class SmoothActivations(Pass):
    """Divides each channel of a group's input by `s_j`, and multiplies the weights by it.

    Before: the linears of a group read `x`. After: they read `x * diagonal`, and their weights are multiplied by
    `1 / diagonal`, with `diagonal = 1 / s` and

        s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)            (SmoothQuant eq. 4)

    where the maxima are taken over all unmasked tokens in all loops, and over all weights of the group.
    Channels that are always zero, in the input or in the weights, keep `s_j = 1`. The function stays the same.

    Does nothing to groups that already have a transform, and to weight-only schemes. With `foldable`, it does nothing
    to groups whose diagonal `fold-diagonals` could not move into a norm, so that none stays in the program.

    Args:
        alpha: how much of the difficulty moves into the weights, from 0 (all stays in activations) to 1.
        learn: whether calibration may change the diagonal.
        max_tokens: about how many tokens are measured; None for the option `statistics_tokens`.
        foldable: only groups whose inputs are all made by one norm, the gain of which nothing else reads.

    Raises:
        LoopQError: alpha is out of range, or there is no calibration data.
    """

    def __init__(
        self, alpha: float = 0.5, learn: bool = False, max_tokens: int | None = None, foldable: bool = False
    ) -> None:
        super().__init__()
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
            raise LoopQError(f"SmoothActivations(alpha={alpha!r}) must lie between 0 and 1.")
        self.alpha, self.learn, self.max_tokens, self.foldable = alpha, learn, max_tokens, foldable

    def requires(self, graph_module: fx.GraphModule) -> None:
        state = self.state(graph_module)
        if state.scheme is None or not state.sites:
            raise InternalError("smooth-activations needs annotate-linears before it.")
        if state.run.calibration is None and state.scheme.quantizes_activations:
            raise LoopQError(
                "Smoothing measures activations and needs calibration data: calibration=[token tensors]. Without data "
                "use method='symmetric' or 'quarot' with dynamic scales."
            )

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        state = self.state(graph_module)
        assert state.scheme is not None
        present = group_tables(graph_module)
        uses = {group: found for group, found in group_uses(graph_module).items() if group not in present}
        if self.foldable:
            uses = {group: found for group, found in uses.items() if _foldable(graph_module, found)}
        if not uses or not state.scheme.quantizes_activations:
            return PassResult(graph_module, False)
        observer = _Observer(uses)
        vocabulary, device = vocabulary_size(graph_module), device_of(graph_module)
        wanted = self.max_tokens or state.options.statistics_tokens
        batches = statistics_batches(state.run.calibration, state.signature, vocabulary, device, wanted)
        for inputs in progress(batches, "Measuring channels", len(batches)):
            observer.mask = token_mask(state.signature, inputs)
            with products_in(state.options.precision, device):
                run(graph_module, inputs, observer.watch)
        distributed.largest([observer.largest[group] for group in sorted(observer.largest)])
        for group, found in uses.items():
            scale = smoothing_scale(observer.largest[group], _largest_weight(graph_module, found), self.alpha)
            least = torch.finfo(weight_type(graph_module, found)).tiny
            values = (1 / scale.clamp(least, 1 / least)).to(table_type(graph_module, found)).unsqueeze(0)
            table = add_table(graph_module, group, "diagonal", values, "diagonal" if self.learn else None)
            insert_diagonal(graph_module, group, found, table)
        state.note(f"{len(uses)} groups, alpha {self.alpha:g}")
        return PassResult(graph_module, True)


def smoothing_scale(activation: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """The factors `s_j` (SmoothQuant eq. 4) from the largest magnitudes of each input channel, both `[d]`."""
    scale = activation.double().pow(alpha) / weight.double().pow(1 - alpha)
    alive = (activation > 0) & (weight > 0)
    return torch.where(alive, scale, torch.ones_like(scale)).clamp(*SCALE_RANGE)


def _foldable(graph_module: fx.GraphModule, uses: list[Use]) -> bool:
    """Whether one gain, which only this group reads, makes all inputs of the group."""
    readers: dict[fx.Node, set[fx.Node]] = {}
    for use in uses:
        readers.setdefault(use.x, set()).update(use.linears)
    return isinstance(find_gain(graph_module, readers), Gain)


def _largest_weight(graph_module: fx.GraphModule, uses: list[Use]) -> Tensor:
    """Largest magnitude of each input channel over all weights of a group, `[d]`."""
    weights = {str(weight_chain(linear)[0].target) for use in uses for linear in use.linears}
    return torch.stack([get_tensor(graph_module, name).detach().float().abs().amax(0) for name in weights]).amax(0)


class _Observer:
    """Keeps the largest magnitude of every channel that a group reads, `[d]` by group."""

    def __init__(self, uses: dict[str, list[Use]]) -> None:
        self.largest: dict[str, Tensor] = {}
        self.mask: Tensor | None = None
        self.watched: dict[fx.Node, set[str]] = {}
        for group, found in uses.items():
            for use in found:
                self.watched.setdefault(use.x, set()).add(group)

    def watch(self, n: fx.Node, value: Any) -> None:
        """Called with every node and its value."""
        for group in self.watched.get(n, ()):
            rows = real_tokens(value.detach(), self.mask)
            largest = rows.abs().amax(0).float() if len(rows) else rows.new_zeros(rows.shape[-1])
            if not largest.isfinite().all():
                tag = get_tag(n)
                raise LoopQError(
                    f"The input of {group!r}{f' in {tag}' if tag else ''} (node {n.name!r}) becomes NaN or infinite on "
                    "the calibration data, before any quantization."
                )
            self.largest[group] = torch.maximum(self.largest.get(group, largest), largest)
