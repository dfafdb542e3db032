"""Statistics of one call of a linear, from running the quantized and the full-precision graph side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from loopq_compile.calibration import distributed
from loopq_compile.calibration.batches import real_tokens
from loopq_compile.errors import InternalError, LoopQError
from loopq_compile.graph.keys import SITE
from loopq_compile.graph.loops import get_tag
from loopq_compile.graph.state import get_state
from loopq_compile.solvers.residual import Write, find_write, has_norm, inverse_rms, norm_gain
from loopq_compile.solvers.statistics import Sample, Split
from loopq_compile.solvers.walk import Walk

_aten = torch.ops.aten
HELD = 4
"""One in this many tokens is held back to choose LoaQ's shares."""


@dataclass(frozen=True)
class Layer:
    """A linear to measure.

    Args:
        linear: the node in the quantized graph.
        weight: its weight before rounding, `[out, K]`.
        original: the weight of the full-precision graph, `[out, K₀]`.
    """

    linear: fx.Node
    weight: Tensor
    original: Tensor


class Observer:
    """Runs the quantized graph, and the full-precision one alongside, up to a linear and measures there.

    Args:
        graph_module: the quantized graph.
        teacher: the graph before quantization, with the same node names; None if outputs are not compared.
        batches: inputs of both graphs.
        form: form of LoaQ, see `loopq_compile.solvers.loaq`.
        masks: by batch, which tokens count, `[batch, sequence]`; None for all.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        teacher: fx.GraphModule | None,
        batches: Sequence[Sequence[Tensor]],
        form: int,
        masks: Sequence[Tensor | None],
    ) -> None:
        precision = get_state(graph_module).options.precision
        self.walk = Walk(graph_module, batches, precision)
        self._masks = masks
        self._nodes = {node.name: node for node in graph_module.graph.nodes}
        self._teacher = None if teacher is None else Walk(teacher, batches, precision)
        self._teacher_nodes = {} if teacher is None else {node.name: node for node in teacher.graph.nodes}
        self._form = form

    def write(self, linear: fx.Node) -> Write | None:
        """How `linear` writes to the residual stream (nodes of the full-precision graph), if the form needs it."""
        return None if self._teacher is None or self._form == 1 else find_write(self._counterpart(linear))

    def measure(self, layer: Layer) -> Split:
        """Moments of the input of `layer.linear` in this process; with a teacher, those of one token in four are
        separate.
        """
        linear, write = layer.linear, self.write(layer.linear)
        split: Split | None = None
        gain: Tensor | None = None
        for batch, mask in enumerate(self._masks):
            self.walk.run(batch, linear)
            if self._teacher is not None:
                self._teacher.run(batch, self._counterpart(linear))
            if write is not None and has_norm(write) and gain is None:
                gain = distributed.first(self._gain(batch, layer, write))
                write = None if gain is None else write
            shape = self.walk.value(batch, layer.linear.args[0]).shape  # type: ignore[arg-type]
            sample = _without_padding(self._sample(batch, layer, write, gain), mask, shape)
            measured = Split.of(sample, 0 if self._teacher is None else len(sample[0]) // HELD)
            split = measured if split is None else split.add(measured)
        self.walk.finish(linear)
        if self._teacher is not None:
            self._teacher.finish(self._counterpart(linear))
        assert split is not None
        return split

    def _counterpart(self, linear: fx.Node) -> fx.Node:
        if linear.name not in self._teacher_nodes:
            raise InternalError(f"The full-precision graph has no node {linear.name!r}.")
        return self._teacher_nodes[linear.name]

    def _sample(self, batch: int, layer: Layer, write: Write | None, gain: Tensor | None) -> Sample:
        """Inputs of both graphs and error of the residual stream, as `Moments.of` takes them."""
        inputs: Any = layer.linear.args[0]
        x = _rows(self.walk.value(batch, inputs))
        if self._teacher is None:
            return x, None, None
        teacher_x = self._teacher_input(batch, layer.linear)
        if write is None:
            return x, teacher_x, None
        side = write.add.args.index(write.stream)
        stream = _rows(self.walk.value(batch, self._nodes[write.add.name].args[side]))  # type: ignore[arg-type]
        teacher_stream = _rows(self._teacher.value(batch, write.stream))
        if gain is None and self._form == 2:
            return x, teacher_x, teacher_stream - stream
        bias = self._bias(layer.linear)
        output, teacher_output = F.linear(x, layer.weight, bias), F.linear(teacher_x, layer.original, bias)
        if gain is not None:
            factor, teacher_factor = inverse_rms(output), inverse_rms(teacher_output)
            small = 1e-2 * gain.square().mean()
            missing = (teacher_stream - stream) * (gain / (gain.square() + small))
        else:
            factor, teacher_factor = inverse_rms(stream + output), inverse_rms(teacher_stream + teacher_output)
            missing = teacher_factor * teacher_stream - factor * stream
        if bias is not None:
            missing = missing + (teacher_factor - factor) * bias
        return factor * x, teacher_factor * teacher_x, missing

    def _teacher_input(self, batch: int, linear: fx.Node) -> Tensor:
        assert self._teacher is not None
        node: Any = self._counterpart(linear)
        return _rows(self._teacher.value(batch, node.args[node.target is _aten.addmm.default]))

    def _bias(self, linear: fx.Node) -> Tensor | None:
        node = linear.args[2] if len(linear.args) > 2 else None
        return self.walk.constant(node).float() if isinstance(node, fx.Node) else None

    def _gain(self, batch: int, layer: Layer, write: Write) -> Tensor | None:
        """The gain of the norm between the linear and the residual stream; None if there is no such norm."""
        assert self._teacher is not None
        output = F.linear(self._teacher_input(batch, layer.linear), layer.original, self._bias(layer.linear))
        shape = self._teacher.value(batch, write.stream).shape
        normed = self._teacher.apply(batch, write.branch, {write.linear: output.reshape(shape)})
        return norm_gain(output, _rows(normed)) if normed.shape == shape else None


def _without_padding(sample: Sample, mask: Tensor | None, shape: torch.Size) -> Sample:
    x, teacher_x, missing = (None if part is None else real_tokens(part.view(*shape[:-1], -1), mask) for part in sample)
    assert x is not None
    return x, teacher_x, missing


def _rows(x: Any) -> Tensor:
    return x.reshape(-1, x.shape[-1]).float()


def check_finite(linear: fx.Node, split: Split) -> None:
    """Refuses statistics that no weight can be solved from.

    Raises:
        LoopQError: the inputs of `linear` are not finite.
    """
    for moments in filter(None, (split.fit, split.held)):
        if not all(
            torch.isfinite(x).all() for x in (moments.hessian, moments.cross, moments.residual) if x is not None
        ):
            tag = get_tag(linear)
            raise LoopQError(
                f"The input of {linear.meta.get(SITE, linear.name)!r} ({tag or 'outside loops'}) becomes "
                "NaN or infinite on the calibration data, so its weight cannot be solved."
            )
