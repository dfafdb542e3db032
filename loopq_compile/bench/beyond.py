"""Numbers of loops other than the compiled one: perplexity of one rolled file, by its input `loops`."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from loopq_compile.backends.onnx import OnnxExecutable
from loopq_compile.bench.cells import Values
from loopq_compile.bench.results import Report
from loopq_compile.compiler import compile as compile_model
from loopq_compile.evaluation.perplexity import evaluate
from loopq_compile.graph.scheme import Scheme

COLUMNS = ("scheme", "method", "loops", "perplexity", "full precision", "ratio", "KL")


def beyond(
    model: Callable[[int | None], nn.Module],
    tokens: Tensor,
    counts: Sequence[int],
    schemes: Sequence[Scheme],
    method: str = "las",
    calibration: Iterable[Tensor] | None = None,
    length: int = 256,
    *,
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Scores a text with each number of loops, against the model itself with the same number.

    Loops beyond the calibrated ones use the last row of every table: of ranges or clip ratios (LAS), transforms and
    transition adapters (LoopQ appendix C.2).

    Args:
        model: returns the model with a number of loops; None means its own number.
        tokens: ids `[n]`, in windows of `length`.
        counts: numbers of loops.
        schemes, method, calibration: of the program, which is compiled once per scheme with the model's own number.

    Raises:
        LoopQError: the model cannot be rolled, or the method needs other data.
    """
    data: list[Values] = []
    for scheme in schemes:
        program = compile_model(
            model(None), tokens[:length].view(1, -1), scheme=scheme, method=method, calibration=calibration
        )
        with tempfile.TemporaryDirectory() as folder:
            run = OnnxExecutable(program.export_onnx(folder, target="onnxruntime", form="rolled").path, threads=1)
            for count in counts:
                say(f"{scheme.name} {scheme.activation}, {count} loops")
                teacher = model(count)
                options: dict[str, Any] = {"length": length, "stride": length}
                score = evaluate(partial(run, loops=count), tokens, teacher=teacher, **options)
                exact = evaluate(teacher, tokens, **options)
                about = {"scheme": f"{scheme.name} {scheme.activation}", "method": method, "loops": count}
                values = {"perplexity": score.perplexity, "full_precision": exact.perplexity, "kl": score.kl}
                data.append({**about, **values, "calibrated": program.loops.count})
    rows = []
    for x in data:
        mark = "" if x["loops"] <= x["calibrated"] else " *"
        ratio = x["perplexity"] / x["full_precision"] if math.isfinite(x["full_precision"]) else math.nan
        numbers = (f"{x['perplexity']:.3f}", f"{x['full_precision']:.3f}", f"{ratio:.3f}", f"{x['kl']:.4f}")
        rows.append((x["scheme"], x["method"], f"{x['loops']}{mark}", *numbers))
    notes = [
        f"One rolled file for all rows; {len(tokens):,} tokens in windows of {length}, KL to the model in full "
        "precision with as many loops. Loops marked * are beyond the calibrated ones and hold the last rows of tables.",
    ]
    return Report("beyond", "Loops beyond calibration", COLUMNS, rows, data, text_columns=2, notes=notes)
