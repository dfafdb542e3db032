"""Methods by schemes: the loss of quality of each, compared with the full-precision model."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from loopq_compile.capture.to_graph import capture
from loopq_compile.compiler import compile as compile_model
from loopq_compile.compiler import quantize
from loopq_compile.errors import LoopQError
from loopq_compile.evaluation.perplexity import LENGTH, STRIDE, Remembered, Score, evaluate
from loopq_compile.graph.options import CalibrationOptions
from loopq_compile.graph.scheme import Scheme
from loopq_compile.graph.state import copy_graph
from loopq_compile.methods import get_pipeline
from loopq_compile.program import Program
from loopq_compile.storage import atomic

FULL_PRECISION = "full precision"
COLUMNS = (
    "method",
    "scheme",
    "scales",
    "perplexity",
    "ratio",
    "KL to full precision",
    "top-1 agreement",
    "quantize s",
    "eval s",
)


@dataclass(frozen=True)
class QualityRow:
    """One line of the table.

    Args:
        method, scheme, activation: what was measured; the first row is `FULL_PRECISION`.
        perplexity: on the held-out tokens.
        ratio: perplexity divided by that of the full-precision model.
        kl: mean KL(full precision || quantized) of a token, in nats.
        agreement: share of tokens whose most likely next token is the same.
        tokens: tokens scored.
        quantize_seconds, eval_seconds: wall-clock time of the passes, calibration included, and of the evaluation.
    """

    method: str
    scheme: str
    activation: str
    perplexity: float
    ratio: float
    kl: float | None
    agreement: float | None
    tokens: int
    quantize_seconds: float
    eval_seconds: float

    def cells(self) -> tuple[str, ...]:
        """The row as text, in the order of `COLUMNS`."""
        return (
            self.method,
            self.scheme,
            self.activation,
            f"{self.perplexity:.3f}",
            f"{self.ratio:.3f}",
            "" if self.kl is None else f"{self.kl:.4f}",
            "" if self.agreement is None else f"{self.agreement:.1%}",
            f"{self.quantize_seconds:.1f}" if self.quantize_seconds else "",
            f"{self.eval_seconds:.1f}",
        )


@dataclass(frozen=True)
class Variant:
    """A method with a scheme, such as `las` with `w4a4` and static scales."""

    method: str
    scheme: Scheme

    def __str__(self) -> str:
        return f"{self.method} {self.scheme.name} {self.scheme.activation}"


def variants(
    methods: Sequence[str], schemes: Sequence[str], activations: Sequence[str], **options: Any
) -> list[Variant]:
    """All combinations, schemes outermost; weight-only schemes appear once. `options` are fields of `Scheme`.

    Raises:
        LoopQError: a name is unknown, or there is no name.
    """
    for method in methods:
        get_pipeline(method)
    found = []
    for name in schemes:
        for activation in activations:
            scheme = Scheme.parse(name, activation=activation, **options)
            if scheme.quantizes_activations or activation == activations[0]:
                found += [Variant(method, scheme) for method in methods]
    if not found:
        raise LoopQError("Nothing to measure: name at least one method, one scheme and one kind of activation scales.")
    return found


def quality(
    model: nn.Module,
    tokens: Tensor,
    runs: Iterable[Variant],
    calibration: Iterable[Any] | None,
    *,
    example_inputs: Any = None,
    length: int = LENGTH,
    stride: int = STRIDE,
    options: CalibrationOptions | None = None,
) -> Iterator[tuple[QualityRow, Program | None]]:
    """Quantizes and measures one variant after the other; the model is captured once.

    Args:
        model: the full-precision model; it is the teacher.
        tokens: held-out token ids, `[n]`.
        runs: what to measure, from `variants`.
        calibration: batches for each of them; None for data-free methods.
        example_inputs: for `capture`; Hugging Face causal language models need none.
        length, stride: of the perplexity's sliding window.
        options: options of calibration, for methods that learn.

    Yields:
        Each row and its program as soon as it is measured; first `FULL_PRECISION`, without a program.
    """
    batches = None if calibration is None else list(calibration)
    captured = capture(model, example_inputs)
    teacher = Remembered(model)
    base = evaluate(teacher, tokens, length=length, stride=stride, title=FULL_PRECISION)
    yield _row(FULL_PRECISION, "", "", base, base, 0.0), None
    for run in runs:
        start = time.perf_counter()
        if batches is None:  # reports what needs data
            program = compile_model(model, example_inputs, scheme=run.scheme, method=run.method)
        else:
            program = quantize(copy_graph(captured), run.scheme, get_pipeline(run.method), batches, options)
        seconds = time.perf_counter() - start
        score = evaluate(program, tokens, teacher=teacher, length=length, stride=stride, title=str(run))
        activation = run.scheme.activation if run.scheme.quantizes_activations else "none"
        yield _row(run.method, run.scheme.name, activation, score, base, seconds), program


def to_markdown(rows: Sequence[QualityRow]) -> str:
    """The table as Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "| --- | --- | --- |" + " ---: |" * (len(COLUMNS) - 3)]
    lines += ["| " + " | ".join(row.cells()) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def to_json(rows: Sequence[QualityRow], **about: Any) -> str:
    """The table as JSON, with `about` as facts about the run; numbers that are not finite become null."""
    plain = [
        {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(row).items()
        }
        for row in rows
    ]
    return json.dumps({**about, "rows": plain}, indent=2) + "\n"


def write_results(
    rows: Sequence[QualityRow], directory: str | Path, heading: str = "Quality", **about: Any
) -> list[Path]:
    """Writes `quality.json` and `quality.md` into `directory`.

    Raises:
        LoopQError: the directory cannot be written.
    """
    texts = {"quality.json": to_json(rows, **about), "quality.md": f"# {heading}\n\n{to_markdown(rows)}"}
    return atomic.write_results(directory, texts)


def _row(method: str, scheme: str, activation: str, score: Score, base: Score, seconds: float) -> QualityRow:
    return QualityRow(
        method=method,
        scheme=scheme,
        activation=activation,
        perplexity=score.perplexity,
        ratio=score.perplexity / base.perplexity,
        kl=score.kl,
        agreement=score.agreement,
        tokens=score.tokens,
        quantize_seconds=round(seconds, 3),
        eval_seconds=round(score.seconds, 3),
    )
