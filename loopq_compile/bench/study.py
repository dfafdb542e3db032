"""A study: one model, quantized and measured in many settings, once each."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn

from loopq_compile.analysis import parameters, residual_error
from loopq_compile.bench.cells import Cells, Values, plain
from loopq_compile.bench.settings import Run, Settings
from loopq_compile.capture.to_graph import capture
from loopq_compile.compiler import quantize
from loopq_compile.errors import LoopQError
from loopq_compile.evaluation.perplexity import Remembered, evaluate
from loopq_compile.graph.options import CalibrationOptions
from loopq_compile.graph.state import copy_graph, get_state
from loopq_compile.methods import METHODS, get_pipeline, reference_graph
from loopq_compile.pipeline import Pipeline
from loopq_compile.program import Program
from loopq_compile.sources.calibration_text import read_text
from loopq_compile.sources.self_generated import CALIBRATIONS, CHARACTERS, calibration_data, fingerprint

PROBE_ROWS, PROBE_LENGTH = 4, 128
"""Held-out tokens on which program and model are compared point by point."""


class Study:
    """Quantizes and measures a model; every result is a stored cell.

    Args:
        model: the full-precision model; it is the teacher. Captured once, when the first cell needs it.
        tokenizer: the model's, for calibration text; may be None if no text is tokenized.
        tokens: held-out token ids, `[n]`.
        settings: settings of all cells.
        cells: where results are stored.
        say: called for every cell that was measured.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        tokens: Tensor,
        settings: Settings,
        cells: Cells | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.model, self.tokenizer, self.tokens, self.settings = model, tokenizer, tokens, settings
        self.cells, self._say = cells or Cells(), say
        self._batches: dict[tuple[int, int], list[Tensor]] = {}

    @cached_property
    def captured(self) -> fx.GraphModule:
        """The model's graph in full precision."""
        return capture(self.model)

    @cached_property
    def teacher(self) -> Remembered:
        """The model, which stores its outputs for the held-out text."""
        return Remembered(self.model)

    @property
    def window(self) -> dict[str, Any]:
        """Length and stride of the perplexity's window."""
        return {"length": self.settings.length, "stride": self.settings.stride}

    @cached_property
    def _about(self) -> Values:
        from loopq_compile._version import __version__

        tokens = hashlib.blake2b(self.tokens.numpy().tobytes(), digest_size=8).hexdigest()
        weights = fingerprint(self.model)
        return {"version": __version__, "model": self.settings.model, "weights": weights, "tokens": tokens}

    def full_precision(self) -> Values:
        """Perplexity of the model: `{"perplexity", "tokens", "seconds"}`."""
        window = self.window

        def measure() -> Values:
            score = evaluate(self.teacher, self.tokens, title="full precision", **window)
            return {"perplexity": score.perplexity, "tokens": score.tokens, "seconds": round(score.seconds, 3)}

        return self.cell("full precision", {**window, "kind": "full precision"}, measure)

    def measure(self, run: Run) -> Values:
        """Everything measured for one setting; see `_measure`. An impossible setting gives `{"error": message}`.

        Raises:
            LoopQError: the model cannot be measured at all.
        """
        self.full_precision()
        try:
            return self.cell(str(run), self.describe(run), lambda: self._measure(run))
        except LoopQError as error:
            self._say(f"  {run}: {error}")
            return {"error": str(error)}

    def describe(self, run: Run) -> Values:
        """Everything that determines the result of a run, for the name of its cell."""
        settings = self.settings
        text, count = settings.calibration, run.samples or settings.samples
        if text not in CALIBRATIONS:
            content = read_text(text, CHARACTERS * count * settings.sample_length, split="train")
            text = hashlib.blake2b(content.encode()).hexdigest()
        return {
            "kind": "run",
            "method": run.method,
            "scheme": asdict(run.scheme),
            "flags": dict(run.flags),
            "options": {**settings.options, **run.options},
            "seed": run.seed,
            "calibration": [text, count, settings.sample_length],
            "window": [settings.length, settings.stride],
        }

    def cell(self, name: str, about: Mapping[str, Any], measure: Callable[[], Values]) -> Values:
        """A cell of this study; model, text and version are added to `about`."""

        def noted() -> Values:
            start = time.perf_counter()
            values = measure()
            perplexity = values.get("perplexity")
            result = f"perplexity {perplexity:.3f}" if perplexity is not None else "done"
            self._say(f"  {name}: {result} ({time.perf_counter() - start:.0f} s)")
            return values

        return self.cells.get(name, {**self._about, **about}, noted)

    def batches(self, samples: int | None = None, seed: int = 0) -> list[Tensor]:
        """Calibration batches; `samples` rows, by default the study's own number."""
        settings, count = self.settings, samples or self.settings.samples
        if (count, seed) not in self._batches:
            self._batches[count, seed] = calibration_data(
                settings.calibration,
                self.model,
                self.tokenizer,
                count,
                settings.sample_length,
                seed,
                cache=settings.cache,
            )
        return self._batches[count, seed]

    def program(self, run: Run, checkpoint: Path | None = None) -> Program:
        """The quantized model. Calibration continues from the folder `checkpoint`.

        Raises:
            LoopQError: the method is unknown, does not have these flags, or refuses the model.
        """
        batches = self.batches(run.samples, run.seed)
        options = CalibrationOptions(
            **{"seed": run.seed, "checkpoint": checkpoint, **self.settings.options, **run.options}
        )
        return quantize(copy_graph(self.captured), run.scheme, pipeline_of(run), batches, options)

    def probe(self) -> list[Tensor]:
        """Held-out rows `[1, PROBE_LENGTH]` on which node values are compared."""
        length = min(PROBE_LENGTH, len(self.tokens))
        return [row.view(1, -1) for row in self.tokens.split(length)[:PROBE_ROWS] if len(row) == length]

    def _measure(self, run: Run) -> Values:
        pipeline_of(run)
        batches = self.batches(run.samples, run.seed)
        about = {**self._about, **self.describe(run)}
        with peak_memory() as peak, self.cells.unfinished(str(run), about) as checkpoint:
            start = time.perf_counter()
            program = self.program(run, checkpoint)
            seconds = time.perf_counter() - start
        score = evaluate(program, self.tokens, teacher=self.teacher, title=str(run), **self.window)
        state = get_state(program.graph_module)
        return {
            **score.to_dict(),
            "seconds": round(score.seconds, 3),
            "ratio": score.perplexity / self.full_precision()["perplexity"],
            "scales": run.scheme.activation if state.scheme is None else state.scheme.activation,
            "calibration": {
                "tokens": sum(batch.numel() for batch in batches),
                "steps": sum(int(phase.get("steps", 0)) for phase in state.results.get("calibration", ())),
                "seconds": round(seconds, 3),
                "peak bytes": peak.get("bytes"),
            },
            "parameters": parameters.by_part(self.captured, program.graph_module),
            "trajectory": self._trajectory(run, program),
            "results": plain(state.results),
        }

    def _trajectory(self, run: Run, program: Program) -> list[Values]:
        if [spec.dtype.is_floating_point for spec in get_state(self.captured).signature.inputs] != [False]:
            return []
        reference = reference_graph(self.captured, run.scheme)
        where = residual_error.points(reference)
        found = residual_error.errors(reference, program.graph_module, where, self.probe())
        return [{**asdict(point), "error": found[point.node]} for point in where if point.node in found]


def pipeline_of(run: Run) -> Pipeline:
    """The run's pipeline.

    Raises:
        LoopQError: the method is unknown or has no such flags.
    """
    if not run.flags:
        return get_pipeline(run.method)
    get_pipeline(run.method)
    try:
        return METHODS[run.method](**run.flags)
    except TypeError as error:
        flags = ", ".join(f"{name}={value}" for name, value in run.flags.items())
        raise LoopQError(f"Method {run.method!r} of this version cannot be built with {flags}: {error}.") from error


@contextlib.contextmanager
def peak_memory() -> Iterator[dict[str, int]]:
    """Records the largest resident size of the process while it is open, in `["bytes"]`; nothing on other systems than
    Linux."""
    noted: dict[str, int] = {}
    status = Path("/proc/self/status")
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    yield noted
    with contextlib.suppress(OSError, StopIteration, ValueError):
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        noted["bytes"] = int(line.split()[1]) * 1024
