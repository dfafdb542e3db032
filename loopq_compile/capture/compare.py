"""Runs a captured graph and its model at sizes other than the example's, to see whether they agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from loopq_compile.capture.example_inputs import Dimensions, resize, split_call
from loopq_compile.capture.module_state import ModelState
from loopq_compile.graph.signature import Signature


class Comparison:
    """Called with sizes by name of dimension; returns whether model and graph compute the same there.

    Args:
        model: the model, in evaluation mode.
        graph_module: the graph captured from it.
        signature: signature of the graph.
        arguments: the example, which is cut or repeated to the sizes asked for.
        named: which of its dimensions vary.
        state: state of the model, restored after every run.
    """

    def __init__(
        self,
        model: nn.Module,
        graph_module: fx.GraphModule,
        signature: Signature,
        arguments: Mapping[str, Any],
        named: Dimensions,
        state: ModelState,
    ) -> None:
        self.model, self.graph_module, self.signature, self.state = model, graph_module, signature, state
        self.arguments, self.named = arguments, named
        self._known: dict[tuple[int, int], bool] = {}
        state.protect_values()

    def __call__(self, sizes: Mapping[str, int]) -> bool:
        """False also if the model does not run, or if the example cannot be resized to these sizes."""
        known = {"batch": sizes.get("batch", 1), "sequence": sizes.get("sequence", 1)}
        if any(sizes[name] != self._captured(name) for name in sizes if name not in known):
            return False
        key = (known["batch"], known["sequence"])
        if key not in self._known:
            self._known[key] = self._agrees(_without_padding(resize(self.arguments, self.named, known)))
        return self._known[key]

    def _captured(self, name: str) -> int | None:
        for spec in self.signature.inputs:
            if name in spec.shape:
                return int(self.arguments[spec.name].shape[spec.shape.index(name)])
        return None

    def _agrees(self, arguments: Mapping[str, Any]) -> bool:
        inputs = [arguments[spec.name] for spec in self.signature.inputs]
        devices = sorted({value.device.index or 0 for value in inputs if value.device.type == "cuda"})
        args, _, kwargs = split_call(self.model, arguments)
        results = []
        for run in (
            lambda: self.model(*args.values(), **kwargs),
            lambda: self.signature.restore(self.graph_module(*inputs)),
        ):
            try:
                with torch.random.fork_rng(devices), torch.no_grad():
                    torch.manual_seed(0)
                    results.append([v for v in pytree.tree_leaves(run()) if isinstance(v, Tensor)])
            except Exception:  # models raise anything for a size that they do not accept
                return False
            finally:
                self.state.restore()
        expected, found = results
        return len(expected) == len(found) and all(map(_same, found, expected))


def _without_padding(arguments: dict[str, Any]) -> dict[str, Any]:
    """The call with a mask that hides nothing: part of an example may be only padding, and would prove nothing."""
    mask = arguments.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2 and not mask.is_floating_point():
        return {**arguments, "attention_mask": torch.ones_like(mask)}
    return arguments


def _same(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    tolerance = 1e-5 if expected.dtype in (torch.float32, torch.float64) else 1e-2
    finite = expected[expected.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance * largest, equal_nan=True)
