"""How an exported file grows with the number of loops: nodes, bytes, time to open, memory, time of a call."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from loopq_compile.bench import session
from loopq_compile.bench.cells import Values
from loopq_compile.bench.results import Report
from loopq_compile.compiler import compile as compile_model
from loopq_compile.graph.scheme import Scheme

COLUMNS = ("target", "form", "loops", "nodes", "MB", "open ms", "memory MB", "ms a call")
TARGETS, FORMS = ("qdq", "onnxruntime"), ("unrolled", "rolled")


def growth(
    model: Callable[[int], nn.Module],
    counts: Sequence[int],
    scheme: Scheme,
    length: int = 16,
    targets: Sequence[str] = TARGETS,
) -> Report:
    """Compiles, exports and opens a model with each number of loops.

    Args:
        model: returns the model that runs a given number of loops.
        counts: numbers of loops.
        scheme: weights are rounded to nearest, data-free: `a16` or dynamic scales.
        length: tokens of the call that is timed, one row.
        targets: targets of the export.

    Raises:
        LoopQError: the scheme needs data, or the model cannot be rolled.
    """
    rows: list[Sequence[str]] = []
    data: list[Values] = []
    for count in counts:
        program = compile_model(model(count), scheme=scheme, method="symmetric")
        for target, form in itertools.product(targets, FORMS):
            with tempfile.TemporaryDirectory() as folder:
                report = program.export_onnx(Path(folder) / "onnx", target=target, form=form)
                values = session.measure(report.path, length)
            about = {"target": target, "form": form, "loops": count, "nodes": report.node_count, "bytes": report.bytes}
            data.append({**about, **values})
    data.sort(key=lambda values: (targets.index(values["target"]), FORMS.index(values["form"])))
    for x in data:
        sizes = (f"{x['bytes'] / 1e6:.2f}", f"{x['load_ms']:.0f}", f"{x['memory'] / 1e6:.0f}", f"{x['call_ms']:.2f}")
        rows.append((x["target"], x["form"], str(x["loops"]), f"{x['nodes']:,}", *sizes))
    return Report(
        "loops",
        f"Exported files by number of loops, {scheme.name}",
        COLUMNS,
        rows,
        data,
        text_columns=2,
        notes=[
            f"One thread; a call reads 1 x {length} tokens; memory is what opening and one call add to the process."
        ],
    )
