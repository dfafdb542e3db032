"""How fast a model reads and writes text: PyTorch, ONNX Runtime in full precision, and quantized files."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from loopq_compile.bench.cells import Values
from loopq_compile.bench.report import Report
from loopq_compile.bench.speed_session import Job, measure
from loopq_compile.capture import capture
from loopq_compile.driver import compile as compile_model
from loopq_compile.passes.tag_loops import TagLoops
from loopq_compile.pipeline import Pipeline
from loopq_compile.program import Program
from loopq_compile.scheme import Scheme


def speed(
    name: str,
    model: nn.Module,
    schemes: Sequence[str] = ("w4a16", "w4a8", "w4a4"),
    forms: Sequence[str] = ("unrolled",),
    job: Job | None = None,
    head_bits: Sequence[int | None] = (None,),
    torch_dtypes: Sequence[str] = ("float32", "bfloat16"),
    methods: Sequence[str] = ("symmetric",),
    *,
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Measures a model in several ways, each in a process of its own.

    Args:
        name: by which such a process loads the PyTorch model.
        model: the model itself, which is exported here.
        schemes: of quantized files, compiled without data.
        forms: of the export: "unrolled", "rolled".
        head_bits: of the head in quantized files, None for floating point.
        job: lengths, batches and repeats; its model is put in here.
        torch_dtypes: in which PyTorch runs the model as it is.
        methods: that need no data: "symmetric" has nothing in front of its products, "quarot" a transform for every
            group of linears, as learned methods have.
        say: told what is being measured.

    Raises:
        LoopQError: a scheme needs data, the model cannot have a key-value cache, or a process failed.
    """
    job = job or Job(name)
    data: list[Values] = []
    for dtype in torch_dtypes:
        say(f"PyTorch {dtype}")
        data.append({"runs": f"PyTorch {dtype}", "form": "eager", **measure(replace(job, model=name, dtype=dtype))})
    options: dict[str, Any] = {"target": "onnxruntime", "cache": True, "last_token": True}
    for runs, program in _programs(model, schemes, methods):
        for form, head in itertools.product(forms, head_bits if program.scheme else (None,)):
            what = f"{runs}, head w{head}" if head else runs
            say(f"{what}, {form}")
            with tempfile.TemporaryDirectory() as folder:
                made = program.export_onnx(folder, form=form, head_bits=head, **options)
                values = measure(replace(job, model=str(made.path), dtype=""))
            data.append({"runs": what, "form": form, "bytes": made.bytes, "nodes": made.node_count, **values})
    return _report(name, job, data)


def _programs(model: nn.Module, schemes: Sequence[str], methods: Sequence[str]) -> Iterator[tuple[str, Program]]:
    example: Any = None if hasattr(model, "prepare_inputs_for_generation") else torch.ones(2, 8, dtype=torch.int64)
    yield "ONNX Runtime float32", Program(Pipeline([TagLoops()]).run(capture(model, example)))
    for scheme, method in itertools.product(schemes, methods):
        name = f"ours {scheme}" if method == "symmetric" else f"ours {scheme} {method}"
        yield name, compile_model(model, example, scheme=Scheme.parse(scheme), method=method)


def _report(name: str, job: Job, data: list[Values]) -> Report:
    columns = ["runs", "form", "MB", "open ms", "memory MB"]
    columns += [f"prefill {length}" for length in job.prefill] + [f"decode x{batch}" for batch in job.decode]
    rows = []
    for x in data:
        size = f"{x['bytes'] / 1e6:.1f}" if "bytes" in x else ""
        rates = [*x["prefill"].values(), *x["decode"].values()]
        numbers = [f"{x['load_ms']:.0f}", f"{x['memory'] / 1e6:.0f}", *(f"{rate:,.1f}" for rate in rates)]
        rows.append((x["runs"], x["form"], size, *numbers))
    notes = [
        f"Tokens a second, one thread, the best of {job.repeats} runs. Prefill: one prompt of so many tokens, logits "
        f"of the last. Decode: {job.steps} steps of 1 token behind {job.context} tokens of context, all rows counted.",
        "Memory is what opening and running add to the resident size of a process of its own.",
    ]
    return Report("speed", f"Speed of {name}", columns, rows, data, text_columns=2, notes=notes)
