"""Early exit: loops run against perplexity, by threshold, measured token by token as in generation."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loopq_compile.backends.onnx import OnnxExecutable
from loopq_compile.bench.cells import Values
from loopq_compile.bench.results import Report
from loopq_compile.compiler import compile as compile_model
from loopq_compile.evaluation.perplexity import evaluate
from loopq_compile.generation.decoders import TokenByToken
from loopq_compile.graph.scheme import Scheme

COLUMNS = ("scheme", "threshold", "loops", "perplexity", "ms a token", "all computed: loops", "perplexity")


def exits(
    model: nn.Module,
    tokens: Tensor,
    schemes: Sequence[str],
    thresholds: Sequence[float],
    length: int = 256,
    *,
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Exports a model with early exit and a cache (`onnxruntime`, rolled), and scores a text at every threshold.

    Args:
        model: a looped model with an exit gate.
        tokens: ids `[n]`.
        schemes: weights are rounded to nearest, data-free.
        thresholds: thresholds at which the loop stops; 1 runs all loops.
        length: tokens of a window; each window begins with an empty cache.
        say: called with what is being measured.

    Raises:
        LoopQError: the model has no exit gate or no cache, or a scheme needs data.
    """
    data: list[Values] = []
    for name in schemes:
        program = compile_model(model, tokens[:length].view(1, -1), scheme=Scheme.parse(name), method="symmetric")
        with tempfile.TemporaryDirectory() as folder:
            options: dict[str, Any] = {"target": "onnxruntime", "form": "rolled", "cache": True, "early_exit": True}
            run = OnnxExecutable(program.export_onnx(folder, **options).path, threads=1)
            whole = _Whole(run, program.loops.count)
            for threshold in sorted(thresholds, reverse=True):
                say(f"{name}, threshold {threshold:g}")
                data.append({"scheme": name, "threshold": threshold, **_measure(run, whole, tokens, threshold, length)})
    rows = []
    for x in data:
        numbers = (f"{x['loops']:.2f}", f"{x['perplexity']:.3f}", f"{x['ms']:.2f}", f"{x['picked_loops']:.2f}")
        rows.append((x["scheme"], f"{x['threshold']:g}", *numbers, f"{x['picked_perplexity']:.3f}"))
    notes = [
        f"{len(tokens):,} tokens in windows of {length}, read one by one from a cache, one row, one thread. Loops that "
        "a token skips have the keys and values of its last computed loop in the cache.",
        "All computed: every token runs all loops and its logits are picked afterwards by the same rule, so nothing is "
        "saved and no cache has holes; the mean of the loops picked stands beside it.",
    ]
    return Report("exit", "Early exit", COLUMNS, rows, data, notes=notes)


class _Whole:
    """Logits of every number of loops from whole windows, without holes in caches; stored by window."""

    def __init__(self, run: OnnxExecutable, count: int) -> None:
        self.run, self.count = run, count
        self.known: dict[bytes, tuple[Tensor, Tensor]] = {}
        self.threshold, self.loops = 1.0, list[float]()

    def __call__(self, ids: Tensor) -> Tensor:
        key = ids.numpy().tobytes()
        if key not in self.known:
            results = [self.run(ids, loops=loops + 1) for loops in range(self.count)]
            self.known[key] = torch.stack([r["logits"] for r in results]), results[-1]["exit_logits"]
        logits, gates = self.known[key]
        stopped = 1 - torch.sigmoid(-gates).cumprod(-1) >= self.threshold
        if self.threshold >= 1:
            stopped = torch.zeros_like(stopped)
        stopped[..., -1] = True
        first = stopped.int().argmax(-1)
        self.loops += (first + 1).flatten().tolist()
        return logits.gather(0, first[None, ..., None].expand(1, *logits.shape[1:]))[0]


def _measure(run: OnnxExecutable, whole: _Whole, tokens: Tensor, threshold: float, length: int) -> Values:
    spelled = TokenByToken(run, exit_threshold=threshold)
    score = evaluate(spelled, tokens, length=length, stride=length, batch=1)
    whole.threshold, whole.loops = threshold, []
    picked = evaluate(whole, tokens, length=length, stride=length, batch=1)
    spent = spelled.loops_spent
    milliseconds = score.seconds / len(spent) * 1e3
    values = {"loops": statistics.mean(spent), "perplexity": score.perplexity, "ms": milliseconds}
    return {**values, "picked_perplexity": picked.perplexity, "picked_loops": statistics.mean(whole.loops)}
