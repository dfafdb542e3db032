"""How fast a model reads and writes text: PyTorch, ONNX Runtime in full precision, quantized files, other engines."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from loopq_compile.bench import speed_rivals
from loopq_compile.bench.cells import Cells, Values
from loopq_compile.bench.results import Report
from loopq_compile.bench.speed_contest import Contest, Contestant
from loopq_compile.bench.speed_fidelity import ROW, rows
from loopq_compile.bench.speed_session import Job, load
from loopq_compile.bench.speed_torch import WAYS
from loopq_compile.capture.to_graph import capture
from loopq_compile.compiler import compile as compile_model
from loopq_compile.compiler import load as read_program
from loopq_compile.errors import LoopQError, did_you_mean
from loopq_compile.graph.scheme import Scheme
from loopq_compile.methods import get_pipeline
from loopq_compile.passes.loops.tag_loops import TagLoops
from loopq_compile.pipeline import Pipeline
from loopq_compile.program import Program
from loopq_compile.sources.loading import PROGRAM_FILE
from loopq_compile.storage.manifest import digest

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
    programs: Sequence[str] = (),
    rivals: Sequence[str] = (),
    turns: int = 1,
    cells: Cells | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Measures a model in several ways, each in a separate process; this process holds no model meanwhile.

    Args:
        job: the model, lengths, batches and repeats. With a text, rows also have KL to the float32 model.
        schemes: schemes of quantized files, compiled without data.
        forms: forms of the export: "unrolled", "rolled".
        head_bits: bits of the head in quantized files; None for floating point.
        pytorch: ways in which PyTorch runs the model, from `speed_torch.WAYS`; if "torchao" is not installed, it is
            left out and noted.
        methods: methods that need no data: "symmetric" has nothing before its products, "quarot" a transform for every
            group of linears, like learned methods.
        products: of the export: "packed"; "int8" and (unrolled) "both" if a scheme quantizes activations.
        group_size: neighbouring features that share a scale.
        programs: folders of saved programs of this model, such as calibrated ones; rows like those of `schemes`.
        rivals: other engines, from `speed_rivals.RIVALS`, with 4-bit weights in groups of the same size. One that is
            not installed is left out and noted; one that cannot run the model, or crashes, says so in its row. With
            "openvino", our programs run in OpenVINO, too.
        turns: how often each row is measured, by turns; the best counts.
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
    for name in programs:
        if not (Path(name) / PROGRAM_FILE).is_file():
            raise LoopQError(f"{name} is no saved program; `loopq-compile compile` writes one.")
    for name in rivals:
        if name not in speed_rivals.RIVALS:
            raise LoopQError(f"Unknown rival {name!r}.{did_you_mean(name, speed_rivals.RIVALS)}")
    ways, notes = _pytorch(pytorch)
    exports = [_Export(form=form) for form in forms]
    for parts in itertools.product(schemes, methods, products, forms, head_bits):
        fits = Scheme.parse(parts[0]).quantizes_activations and parts[2:4] != ("both", "rolled")
        if parts[2] == "packed" or fits:
            exports.append(_Export(*parts, group_size))
    exports += [
        _Export(Path(name).name, form=form, head=head, folder=name)
        for name in programs
        for form, head in itertools.product(forms, head_bits)
    ]
    entered = ways + [Contestant(x.runs, x.form, write=partial(_write, job, x), engine=x.digest) for x in exports]
    for name in rivals:
        absent = speed_rivals.missing(name)
        notes.append(absent or f"{name}: {speed_rivals.versions(name)}.")
        if absent is None:
            entered += speed_rivals.contestants(name, job, group_size, head_bits, partial(_program, job, _Export()))
        if absent is None and name == "openvino":
            for x in exports:
                if x.scheme and x.products == "packed" and x.form == "unrolled":
                    write = partial(_write_openvino, job, x)
                    entered += speed_rivals.in_openvino(x.runs, write, speed_rivals.versions(name) + x.digest)
    for note in notes:
        say(note)
    data = Contest(job, turns, cells or Cells(), say).run(entered)
    if all("failed" in x for x in data):
        raise LoopQError(data[0]["failed"] if data else "There is nothing to measure.")
    return _report(job, turns, data, notes)


def _pytorch(names: Sequence[str]) -> tuple[list[Contestant], list[str]]:
    """The rows of PyTorch, and notes on torchao."""
    rows, notes = list[Contestant](), list[str]()
    for name in names:
        way = WAYS[name]
        if way.torchao and importlib.util.find_spec("torchao") is None:
            notes.append("There is no torchao row: torchao is not installed (pip install 'loopq-compile[torchao]').")
            continue
        if way.torchao:
            notes.append(
                "torchao's wheels for x86 come without its CPU kernels: its row dequantizes weights in every call, "
                "and is not the best that torchao can do."
            )
        runs = f"PyTorch {way.dtype}" if not way.torchao else "torchao w4a8"
        rows.append(Contestant(runs, "compiled" if way.compiled else "eager", name))
    return rows, notes


@dataclass(frozen=True)
class _Export:
    """A file to measure; without a scheme it is in full precision."""

    scheme: str = ""
    method: str = "symmetric"
    products: str = "packed"
    form: str = "unrolled"
    head: int | None = None
    group_size: int = 32
    folder: str = ""
    """Of a saved program, whose name then stands in the place of a scheme."""

    @property
    def digest(self) -> str:
        """Tells saved programs of one name apart."""
        return digest(Path(self.folder) / PROGRAM_FILE)[1] if self.folder else ""

    @property
    def runs(self) -> str:
        if not self.scheme:
            return _EXACT
        parts = [f"ours {self.scheme}", *([self.method] if self.method != "symmetric" else [])]
        parts += [self.products] if self.products != "packed" else []
        parts += [f"g{self.group_size}"] if self.group_size != 32 else []
        return " ".join(parts) + (f", head w{self.head}" if self.head else "")


def _program(job: Job, export: _Export) -> Program:
    if export.folder:
        return read_program(export.folder)
    model = load(job)
    example: Any = None if hasattr(model, "prepare_inputs_for_generation") else torch.ones(2, 8, dtype=torch.int64)
    if not export.scheme:
        return Program(Pipeline([TagLoops()]).run(capture(model, example)))
    scheme = Scheme.parse(export.scheme, group_size=export.group_size)
    return compile_model(model, example, scheme=scheme, method=export.method, release_model=True)


def _write(job: Job, export: _Export, folder: Path) -> tuple[str, Values]:
    """Writes a file, and keeps nothing of the model in memory; returns its name and values for the row."""
    options: dict[str, Any] = {"form": export.form, "head_bits": export.head, "products": export.products}
    program = _program(job, export)
    made = program.export_onnx(folder, target="onnxruntime", cache=True, last_token=True, **options)
    return made.path.name, {"bytes": made.bytes, "nodes": made.node_count}


def _write_openvino(job: Job, export: _Export, folder: Path) -> tuple[str, Values]:
    made = _program(job, export).export_openvino(folder, last_token=True, head_bits=export.head)
    return made.path.name, {"bytes": made.bytes, "nodes": made.nodes}


def _report(job: Job, turns: int, data: list[Values], notes: list[str]) -> Report:
    columns = ["runs", "form", "MB", "open ms", "compile s", "memory MB", "peak MB"]
    columns += [f"prefill {length}" for length in job.prefill] + [f"decode x{batch}" for batch in job.decode]
    columns += ["KL"] if job.text else []
    by_turns = f", in {turns} turns" if turns > 1 else ""
    notes = [
        f"Tokens a second, one thread, the best of {job.repeats} runs{by_turns} behind one that does not count. "
        f"Prefill: one prompt of so many tokens, logits of the last. Decode: {job.steps} steps of 1 token behind "
        f"{job.context} tokens of context, all rows counted. Compile: what torch.compile adds to the calls that do not "
        "count.",
        "Memory and peak are what opening and running add to the resident size of a process of its own, at the end "
        "and at most (loading and compiling included).",
        *([_about_kl(job)] if job.text else []),
        *notes,
        *(f"{x['runs']}, {x['form']}: not measured. {x['failed']}" for x in data if "failed" in x),
    ]
    lines = [_row(x, len(columns), bool(job.text)) for x in data]
    return Report("speed", f"Speed of {job.model}", columns, lines, data, text_columns=2, notes=notes)


def _about_kl(job: Job) -> str:
    return (
        f"KL: from the float32 model's predictions to the row's, in nats, on {rows(job.text).numel():,} tokens of "
        f"text, read token by token, in rows of up to {ROW} side by side."
    )


def _row(x: Values, width: int, kl: bool) -> tuple[str, ...]:
    if "failed" in x:
        return (x["runs"], x["form"], "failed", *[""] * (width - 3))
    size = f"{x['bytes'] / 1e6:.1f}" if "bytes" in x else ""
    compiling = f"{x['first_s']:.1f}" if x["form"] == "compiled" else ""
    rates = [*x["prefill"].values(), *x["decode"].values()]
    memory = (f"{x[key] / 1e6:.0f}" for key in ("memory", "peak"))
    numbers = [*memory, *(f"{rate:,.1f}" for rate in rates), *([_kl(x["kl"])] if kl else [])]
    return (x["runs"], x["form"], size, f"{x['load_ms']:.0f}", compiling, *numbers)


def _kl(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.4f}"
