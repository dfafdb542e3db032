"""The cost of compiling by number of layer calls: seconds of every pass, and how they grow."""

from __future__ import annotations

import gc
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx

from loopq_compile.bench.results import Report
from loopq_compile.capture.to_graph import capture
from loopq_compile.compiler import load, quantize
from loopq_compile.graph.options import CalibrationOptions
from loopq_compile.graph.scheme import Scheme
from loopq_compile.methods import get_pipeline
from loopq_compile.passes.loops.roll_loops import RollLoops
from loopq_compile.pipeline import Pipeline, pass_name

SIZES = ((4, 4), (8, 8), (16, 16), (32, 32))
"""Layers and loops: 16, 64, 256 and 1,024 layer calls."""
LINEAR = 1.25
"""Exponents up to this count as linear, since times below a second are imprecise."""
_VOCABULARY, _LENGTH = 64, 8


def compile_growth(sizes: Sequence[tuple[int, int]], method: str, scheme: Scheme, export: bool = False) -> Report:
    """Compiles a small Ouro model of each size (32 channels, since only the number of nodes matters).

    Args:
        sizes: layers and loops, by rising number of calls.
        method: the method whose passes are measured; calibration takes one step on three batches of 2 x 8 tokens.
        scheme: scheme of the program.
        export: whether to measure the unrolled and rolled ONNX file as well, target "qdq".

    Returns:
        One row per step: processor seconds by layer calls, and the exponent `e` of `seconds ~ calls^e` between the last
        two sizes. A pass that occurs several times in a pipeline has one row, with the sum.
    """
    seconds = [_measure(layers, loops, method, scheme, export) for layers, loops in sizes]
    calls = [layers * loops for layers, loops in sizes]
    rows: list[Sequence[str]] = []
    data: list[dict[str, Any]] = []
    for step in seconds[-1]:
        found = [times.get(step, 0.0) for times in seconds]
        growth = exponent(calls, found)
        shown = "" if growth is None else f"{growth:.2f}"
        rows.append((step, *(f"{value:.2f}" for value in found), shown))
        data.append({"step": step, "calls": calls, "seconds": found, "exponent": growth})
    return Report(
        "compile",
        f"Seconds of compiling by layer calls, {method}, {scheme.name}",
        ("step", *(f"{count:,}" for count in calls), "exponent"),
        rows,
        data,
        notes=[
            "Processor time of one run. Garbage collection, which strikes any step, is counted apart.",
            f"Layers x loops: {', '.join(f'{layers} x {loops}' for layers, loops in sizes)}.",
            f"The exponent is that between the last two columns, where the last is a tenth of a second or more: 1 is "
            f"linear; above {LINEAR}: {', '.join(x['step'] for x in data if (x['exponent'] or 0) > LINEAR) or 'none'}.",
        ],
    )


def exponent(calls: Sequence[int], seconds: Sequence[float]) -> float | None:
    """`e` of `seconds ~ calls^e` between the last two sizes; None if there is too little to measure."""
    if len(calls) < 2 or calls[-1] == calls[-2] or seconds[-1] < 0.1 or seconds[-2] <= 0:
        return None
    return math.log(seconds[-1] / seconds[-2]) / math.log(calls[-1] / calls[-2])


def _measure(layers: int, loops: int, method: str, scheme: Scheme, export: bool) -> dict[str, float]:
    """Processor seconds of every step, in order."""
    times: dict[str, float] = {}
    collected = _Collected()

    @contextmanager
    def timed(step: str) -> Iterator[None]:
        start = time.process_time() - collected.seconds
        yield
        times[step] = times.get(step, 0.0) + time.process_time() - collected.seconds - start

    with collected:
        _steps(layers, loops, method, scheme, export, timed)
    times["garbage collection"] = collected.seconds
    return times


class _Collected:
    """Processor seconds of Python's garbage collector while this is open; it may run during any step."""

    def __init__(self) -> None:
        self.seconds, self._start = 0.0, 0.0

    def __enter__(self) -> None:
        gc.collect()
        gc.callbacks.append(self._note)

    def __exit__(self, *_: object) -> None:
        gc.callbacks.remove(self._note)

    def _note(self, phase: str, _: dict[str, int]) -> None:
        if phase == "start":
            self._start = time.process_time()
        else:
            self.seconds += time.process_time() - self._start


def _steps(layers: int, loops: int, method: str, scheme: Scheme, export: bool, timed: Callable[[str], Any]) -> None:
    with timed("capture"):
        graph_module = capture(_model(layers, loops), _tokens(0))
    pipeline = _Timed(get_pipeline(method), timed)
    with timed("all passes and shapes"):
        batches = [_tokens(seed) for seed in range(3)]
        program = quantize(graph_module, scheme, pipeline, batches, CalibrationOptions(steps=1, fused="off"))
    with timed("print"):
        str(program)
    with tempfile.TemporaryDirectory() as folder:
        with timed("save"):
            program.save(Path(folder) / "program")
        with timed("load"):
            load(Path(folder) / "program")
        if export:
            for form in ("unrolled", "rolled"):
                with timed(f"export, {form}"):
                    program.export_onnx(Path(folder) / form, form=form)
    with timed("roll-loops"):
        Pipeline([RollLoops()]).run(program.graph_module)


class _Timed(Pipeline):
    """A pipeline that measures its passes, including their verification."""

    def __init__(self, pipeline: Pipeline, timed: Callable[[str], Any]) -> None:
        super().__init__(pipeline.passes, pipeline.name)
        self.timed = timed

    def _apply(self, item: Any, graph_module: fx.GraphModule, *state: Any) -> fx.GraphModule:
        with self.timed(pass_name(item)):
            return super()._apply(item, graph_module, *state)


def _model(layers: int, loops: int) -> torch.nn.Module:
    from loopq_compile.models import Ouro, OuroConfig

    torch.manual_seed(0)
    return Ouro(
        OuroConfig(
            vocab_size=_VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
            num_attention_heads=2, total_ut_steps=loops,
        )
    ).eval()  # fmt: skip


def _tokens(seed: int) -> torch.Tensor:
    return torch.randint(0, _VOCABULARY, (2, _LENGTH), generator=torch.Generator().manual_seed(seed))
