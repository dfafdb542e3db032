"""The teacher: the captured model before quantization, run once for every batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from loopq_compile.calibration.batches import token_mask
from loopq_compile.calibration.objective import Targets, keep_largest
from loopq_compile.calibration.student import Student
from loopq_compile.calibration.target_store import TargetStore
from loopq_compile.errors import LoopQError
from loopq_compile.graph.options import CalibrationOptions
from loopq_compile.graph.signature import Signature
from loopq_compile.graph.texts import logits_of
from loopq_compile.operators.precision import products_in


class Teacher:
    """Computes `Targets` for batches.

    Args:
        graph_module: the captured graph, before any quantization.
        signature: its calling convention.
        ends: nodes that hold the state at the end of each loop.
        vocabulary: size of the vocabulary, None for models without one.
        options: temperature and top-k; `precision` of its products.
        kept: targets computed by another teacher of the same model, batches and options; this teacher adds its own.
            None keeps them while this teacher lives.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        signature: Signature,
        ends: Sequence[str],
        vocabulary: int | None,
        options: CalibrationOptions,
        kept: TargetStore | None = None,
    ) -> None:
        self._student = Student(graph_module, ends, recompute=False, learned=())
        self._signature, self._ends, self._vocabulary, self._options = signature, ends, vocabulary, options
        self._kept = TargetStore() if kept is None else kept

    def targets(self, number: int, inputs: Sequence[Tensor]) -> Targets:
        """What the student should predict for batch `number`.

        Raises:
            LoopQError: the model in full precision gives NaN.
        """
        found = self._kept.get(number)
        if found is None:
            found = self.ask(inputs)
            self._kept.put(number, found)
        return found

    def ask(self, inputs: Sequence[Tensor]) -> Targets:
        """`targets` without looking up what is kept."""
        with torch.no_grad(), products_in(self._options.precision, inputs[0].device):
            results, known = self._student.run(inputs, {})
        logits, outputs = predictions(results, self._signature, self._vocabulary)
        states = [known[name] for name in self._ends]
        mask = token_mask(self._signature, inputs)
        if logits is None:
            targets = Targets(None, None, None, outputs, states, mask)
        else:
            targets = Targets(*keep_largest(logits, self._options), [], states, mask)
        if not all(torch.isfinite(x).all() for x in ([targets.total] if targets.total is not None else outputs)):
            raise LoopQError("The model in full precision predicts NaN or infinite values on the calibration data.")
        return targets


def predictions(
    results: Sequence[Any], signature: Signature, vocabulary: int | None
) -> tuple[Tensor | None, list[Tensor]]:
    """The logits among the flat `results` of a graph (None if there are none), and its floating-point results."""
    outputs = [x for x in results if isinstance(x, Tensor) and x.is_floating_point()]
    if vocabulary is not None:
        try:
            logits = logits_of(signature.restore(list(results)))
        except LoopQError:
            return None, outputs
        if logits.shape[-1] == vocabulary:
            return logits, outputs
    return None, outputs
