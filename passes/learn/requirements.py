"""What learning needs, from a formula: known before anything runs, and for machines that are not here.

Its constants were fitted to `loopq-compile bench memory` at widths of 256 and 1,024 with 2 to 8 layers. The rehearsal
of a dry run is more exact, but needs as much memory as the compilation itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, fx

from loopq_compile.calibration.batches import count_rows
from loopq_compile.errors import LoopQError
from loopq_compile.graph.options import CalibrationOptions
from loopq_compile.graph.weights import site_calls
from loopq_compile.memory import SLACK
from loopq_compile.passes.learn.calibrate import KEPT_BYTES, LARGE, WEIGHT_BYTES, Calibrate, activation_bytes
from loopq_compile.passes.learn.calibrate_blocks import CalibrateBlocks
from loopq_compile.passes.learn.select_transforms import SelectTransforms
from loopq_compile.passes.quantize.solve_weights import SolveWeights

_FIXED, _NODE = 95 << 20, 60e3
"""Bytes that PyTorch's exporter takes, and a node of the graph with what is made of it."""
_SAVED = 1.5
"""What a quantized program keeps for its backward pass, relative to the values of the captured graph."""
_LOGITS = 5
"""Tensors of the size of the logits at the height of a step."""
_WEIGHT = {"transforms": 4, "blocks": 4, "rounding": 5, "selection": 5, "solver": 3}
"""Bytes for every quantized weight: integers 1 or latent numbers 2, the sum of gradients 2; the rest is measured."""
_LARGEST = {"transforms": 24, "blocks": 24, "rounding": 48, "selection": 24, "solver": 24}
"""Bytes for every number of the largest weight, on which one chain works at a time."""
_SQUARES = 7
"""Matrices `[K, K]` at the height of a solution."""
MARGIN = 1.25
"""A compilation is refused if the formula asks for this many times what is available, and warned of below."""


@dataclass(frozen=True)
class Work:
    """What a model and its calibration data ask for.

    Args:
        weights: quantized weights.
        largest: of the largest of them.
        calls: how often the average weight is used in a run.
        nodes: of the captured graph.
        tokens: in a step.
        length: tokens of the longest row.
        values: bytes of all values of the captured graph in a step, without the logits.
        logits: bytes of the logits in a step.
        layers: about how many times a layer is called.
        squares: sum of the squared widths of all inputs of linears that are read more than once.
        widest, width: the largest and the smallest width of an input.
        outputs: features of the results: for language models, the vocabulary.
        shapes: of all quantized weights, `(N, K)`.
        large: whether a step keeps only what crosses layers, if the options leave it open.
    """

    weights: int
    largest: int
    calls: float
    nodes: int
    tokens: int
    length: int
    values: float
    logits: float
    layers: int
    squares: int
    widest: int
    width: int
    outputs: int
    shapes: tuple[tuple[int, int], ...]
    large: bool

    @staticmethod
    def of(annotated: fx.GraphModule, batches: Sequence[Sequence[Tensor]], options: CalibrationOptions) -> Work:
        """The work on a graph with listed linears.

        Args:
            annotated: the captured graph after `annotate-linears`.
            batches: calibration batches as the graph takes them.
            options: of the calibration.
        """
        found = site_calls(annotated)
        sizes = [math.prod(site.shape) for site, _ in found]
        length = max(batch[0].shape[1] if batch[0].ndim > 1 else 1 for batch in batches)
        rows = min(options.batch_rows, sum(map(count_rows, batches)))
        largest = max(batches, key=lambda batch: batch[0].numel())
        batch = [tensor[:1].expand(rows, *tensor.shape[1:]) if tensor.ndim else tensor for tensor in largest]
        inputs = {linear.args[0]: site.shape[1] for site, linears in found for linear in linears}
        again = {linears[0].args[0]: site.shape[1] for site, linears in found if len(linears) > 1}
        outputs = _outputs(annotated)
        logits = 4.0 * rows * length * outputs
        values = activation_bytes(annotated, batch)
        total = sum(sizes)
        return Work(
            weights=total,
            largest=max(sizes, default=0),
            calls=sum(size * len(linears) for size, (_, linears) in zip(sizes, found, strict=True)) / max(1, total),
            nodes=len(annotated.graph.nodes),
            tokens=rows * length,
            length=length,
            values=max(0.0, values - logits),
            logits=logits,
            layers=max(1, len(inputs) // 4),
            squares=sum(width**2 for width in again.values()),
            widest=max(inputs.values(), default=0),
            width=min(inputs.values(), default=0),
            outputs=outputs,
            shapes=tuple((site.shape[0], site.shape[1]) for site, _ in found),
            large=values + WEIGHT_BYTES * total > KEPT_BYTES,
        )

    def recomputes(self, options: CalibrationOptions) -> bool:
        """Whether a step keeps only what crosses layers."""
        return options.recompute == "on" or (options.recompute == "auto" and self.large)

    def phases(self, passes: Iterable[object], options: CalibrationOptions) -> dict[str, int]:
        """Bytes that every kind of learning in `passes` takes at its peak, beyond the model, by kind."""
        kinds = dict.fromkeys(filter(None, (kind_of(item, options) for item in passes)))
        return {kind: round(self._bytes(kind, options)) for kind in kinds}

    def _bytes(self, kind: str, options: CalibrationOptions) -> float:
        each = _WEIGHT[kind] + 2 * (kind == "transforms" and self.weights <= LARGE)
        total = _FIXED + _NODE * self.nodes + each * self.weights + _LARGEST[kind] * self.largest
        total += SLACK * (self.weights > LARGE)
        if kind == "solver":
            return total + 4 * self.squares + 4 * _SQUARES * self.widest**2
        rows = 1.0 if kind != "selection" else self.length / self.tokens
        kept = _SAVED * self.values
        if kind in ("selection", "blocks") or self.recomputes(options):
            kept = kept / self.layers + 8.0 * self.tokens * self.widest
        return total + rows * (kept + _LOGITS * self.logits)


def kind_of(item: object, options: CalibrationOptions) -> str | None:
    """What a pass does that takes memory: "transforms", "blocks", "rounding", "selection", "solver"; else None."""
    if isinstance(item, Calibrate):
        return "rounding" if "rounding" in item.kinds else "transforms"
    if isinstance(item, SelectTransforms):
        return "selection" if options.selection_budget else None
    if isinstance(item, SolveWeights):
        return None if (options.weight_solver or item.options.solver) == "rtn" else "solver"
    return "blocks" if isinstance(item, CalibrateBlocks) else None


def _outputs(graph_module: fx.GraphModule) -> int:
    """Features of the largest result: for language models, the vocabulary."""
    results = next(node for node in graph_module.graph.nodes if node.op == "output").args[0]
    shapes = [node.meta["val"].shape for node in results if isinstance(node, fx.Node) and "val" in node.meta]
    return max((int(shape[-1]) for shape in shapes if len(shape)), default=0)


def check_fits(work: Work, passes: Sequence[object], options: CalibrationOptions, available: int) -> str | None:
    """A warning if the formula asks for more than the `available` bytes; None if all is well.

    Raises:
        LoopQError: it asks for far more. The message names the options that would make it fit.
    """
    phases = work.phases(passes, options)
    if not phases or max(phases.values()) <= available:
        return None
    worst = max(phases, key=lambda kind: phases[kind])
    text = (
        f"Learning ({worst}) needs about {phases[worst] / 2**30:.1f} GiB beyond the model, for {work.weights:,} "
        f"quantized weights and steps of {work.tokens:,} tokens; {available / 2**30:.1f} GiB are available."
    )
    changes: list[dict[str, object]] = [{"recompute": "on"}, {"batch_rows": 1}, {"recompute": "on", "batch_rows": 1}]
    for change in changes:
        tokens = work.length if "batch_rows" in change else work.tokens
        share = tokens / work.tokens
        less = replace(work, tokens=tokens, values=work.values * share, logits=work.logits * share)
        if max(less.phases(passes, replace(options, **change)).values()) <= available:  # type: ignore[arg-type]
            text += f" It would fit with {' and '.join(f'{name}={value!r}' for name, value in change.items())}."
            break
    else:
        text += " Use a machine with more memory, shorter rows, or a method that learns less, such as 'las'."
    if phases[worst] > MARGIN * available:
        raise LoopQError(text)
    return text
