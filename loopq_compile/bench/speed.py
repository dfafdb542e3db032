"""How fast a model reads and writes text: PyTorch, ONNX Runtime in full precision, and quantized files."""

from __future__ import annotations

import gc
import importlib.util
import itertools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from loopq_compile._version import __version__
from loopq_compile.bench.cells import Cells, Values
from loopq_compile.bench.results import Report
from loopq_compile.bench.speed_session import Job, load, measure
from loopq_compile.bench.speed_torch import WAYS
from loopq_compile.capture.to_graph import capture
from loopq_compile.compiler import compile as compile_model
from loopq_compile.errors import LoopQError, did_you_mean
from loopq_compile.graph.scheme import Scheme
from loopq_compile.memory import trim
from loopq_compile.methods import get_pipeline
from loopq_compile.passes.loops.tag_loops import TagLoops
from loopq_compile.pipeline import Pipeline
from loopq_compile.program import Program

_EXACT = "ONNX Runtime float32"


def speed(
    job: Job,
    schemes: Sequence[str] = ("w4a16", "w4a8", "w4a4"),
    forms: Sequence[str] = ("unrolled",),
    head_bits: Sequence[int | None] = (None,),
    pytorch: Sequence[str] = ("float32", "bfloat16"),
    methods: Sequence[str] = ("symmetric",),
    products: Sequence[str] = ("packed",),
    group_size: int = 32,
    *,
    cells: Cells | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Measures a model in several ways, each in a separate process; this process holds no model meanwhile.

    Args:
        job: the model, lengths, batches and repeats.
        schemes: schemes of quantized files, compiled without data.
        forms: forms of the export: "unrolled", "rolled".
        head_bits: bits of the head in quantized files; None for floating point.
        pytorch: ways in which PyTorch runs the model, from `speed_torch.WAYS`; if "torchao" is not installed, it is
            left out and noted.
        methods: methods that need no data: "symmetric" has nothing before its products, "quarot" a transform for every
            group of linears, like learned methods.
        products: of the export: "packed"; "int8" and (unrolled) "both" if a scheme quantizes activations.
        group_size: neighbouring features that share a scale.
        cells: stores finished rows, so that an interrupted run can continue.
        say: called with what is being measured.

    Raises:
        LoopQError: a name is unknown, a scheme needs data, the model cannot have a key-value cache, or nothing could be
            measured. If only some rows fail, each says why.
    """
    for name in pytorch:
        if name not in WAYS:
            raise LoopQError(f"Unknown way {name!r} to run PyTorch.{did_you_mean(name, WAYS)}")
    for scheme, method in itertools.product(schemes, methods):
        Scheme.parse(scheme), get_pipeline(method)
    cells, data, notes = cells or Cells(), list[Values](), list[str]()
    for way in pytorch:
        if WAYS[way].torchao and importlib.util.find_spec("torchao") is None:
            notes.append("There is no torchao row: torchao is not installed (pip install 'loopq-compile[torchao]').")
            say(notes[-1])
            continue
        if WAYS[way].torchao:
            notes.append(
                "torchao's wheels for x86 come without its CPU kernels: its row dequantizes weights in every call, "
                "and is not the best that torchao can do."
            )
        data.append(_torch_row(job, way, cells, say))
    exports = [_Export(form=form) for form in forms]
    for parts in itertools.product(schemes, methods, products, forms, head_bits):
        fits = Scheme.parse(parts[0]).quantizes_activations and parts[2:4] != ("both", "rolled")
        if parts[2] == "packed" or fits:
            exports.append(_Export(*parts, group_size))
    data += [_onnx_row(job, export, cells, say) for export in exports]
    if all("failed" in x for x in data):
        raise LoopQError(data[0]["failed"] if data else "There is nothing to measure.")
    return _report(job, data, notes)


def _torch_row(job: Job, way: str, cells: Cells, say: Callable[[str], None]) -> Values:
    runs = f"PyTorch {WAYS[way].dtype}" if not WAYS[way].torchao else "torchao w4a8"
    row = {"runs": runs, "form": "compiled" if WAYS[way].compiled else "eager"}
    return _cell(row, replace(job, way=way), cells, say, partial(measure, replace(job, way=way)))


@dataclass(frozen=True)
class _Export:
    """A file to measure; without a scheme it is in full precision."""

    scheme: str = ""
    method: str = "symmetric"
    products: str = "packed"
    form: str = "unrolled"
    head: int | None = None
    group_size: int = 32

    @property
    def runs(self) -> str:
        if not self.scheme:
            return _EXACT
        parts = [f"ours {self.scheme}", *([self.method] if self.method != "symmetric" else [])]
        parts += [self.products] if self.products != "packed" else []
        parts += [f"g{self.group_size}"] if self.group_size != 32 else []
        return " ".join(parts) + (f", head w{self.head}" if self.head else "")


def _onnx_row(job: Job, export: _Export, cells: Cells, say: Callable[[str], None]) -> Values:
    def run() -> Values:
        with tempfile.TemporaryDirectory() as folder:
            written = _write(job, export, folder)
            gc.collect()  # graphs and their nodes refer to each other
            trim()
            return written | measure(replace(job, model=str(Path(folder) / "model.onnx"), config=None))

    return _cell({"runs": export.runs, "form": export.form}, job, cells, say, run)


def _cell(row: Values, job: Job, cells: Cells, say: Callable[[str], None], run: Callable[[], Values]) -> Values:
    """A row, measured or stored; a row that fails says why, and is tried again next time."""
    say(f"{row['runs']}, {row['form']}")
    about = {"speed": row, "version": __version__, "torch": torch.__version__, **asdict(job)}
    try:
        return row | cells.get(f"{row['runs']}-{row['form']}", about, run)
    except LoopQError as error:
        say(f"failed: {error}")
        return row | {"failed": str(error)}


def _write(job: Job, export: _Export, folder: str) -> Values:
    """Writes a file, and keeps nothing of the model in memory."""
    model = load(job)
    example: Any = None if hasattr(model, "prepare_inputs_for_generation") else torch.ones(2, 8, dtype=torch.int64)
    options: dict[str, Any] = {"form": export.form, "head_bits": export.head, "products": export.products}
    if export.scheme:
        scheme = Scheme.parse(export.scheme, group_size=export.group_size)
        program = compile_model(model, example, scheme=scheme, method=export.method, release_model=True)
    else:
        program = Program(Pipeline([TagLoops()]).run(capture(model, example)))
    made = program.export_onnx(folder, target="onnxruntime", cache=True, last_token=True, **options)
    return {"bytes": made.bytes, "nodes": made.node_count}


def _report(job: Job, data: list[Values], notes: list[str]) -> Report:
    columns = ["runs", "form", "MB", "open ms", "compile s", "memory MB", "peak MB"]
    columns += [f"prefill {length}" for length in job.prefill] + [f"decode x{batch}" for batch in job.decode]
    notes = [
        f"Tokens a second, one thread, the best of {job.repeats} runs behind one that does not count. Prefill: one "
        f"prompt of so many tokens, logits of the last. Decode: {job.steps} steps of 1 token behind {job.context} "
        "tokens of context, all rows counted. Compile: what torch.compile adds to the calls that do not count.",
        "Memory and peak are what opening and running add to the resident size of a process of its own, at the end "
        "and at most (loading and compiling included).",
        *notes,
        *(f"{x['runs']}, {x['form']}: not measured. {x['failed']}" for x in data if "failed" in x),
    ]
    rows = [_row(x, len(columns)) for x in data]
    return Report("speed", f"Speed of {job.model}", columns, rows, data, text_columns=2, notes=notes)


def _row(x: Values, width: int) -> tuple[str, ...]:
    if "failed" in x:
        return (x["runs"], x["form"], "failed", *[""] * (width - 3))
    size = f"{x['bytes'] / 1e6:.1f}" if "bytes" in x else ""
    compiling = f"{x['first_s']:.1f}" if x["form"] == "compiled" else ""
    rates = [*x["prefill"].values(), *x["decode"].values()]
    memory = (f"{x[key] / 1e6:.0f}" for key in ("memory", "peak"))
    return (x["runs"], x["form"], size, f"{x['load_ms']:.0f}", compiling, *memory, *(f"{rate:,.1f}" for rate in rates))
