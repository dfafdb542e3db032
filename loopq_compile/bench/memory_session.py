"""`python -m loopq_compile.bench.memory_session JSON`: calibrates one model in a separate process.

Takes a `Job` as JSON. Prints a line of JSON for every pass: its name, `seconds`, and `peak`, the largest resident size
while it ran minus what was resident before the first pass, in bytes. The line of the model comes first. A job that is
only rehearsed prints the same lines as the dry run predicts them. Under `torchrun` the first process prints, and a peak
is the largest of all processes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from loopq_compile.analysis.estimate import estimate
from loopq_compile.bench.random_models import random_model
from loopq_compile.calibration.distributed import largest
from loopq_compile.capture.to_graph import capture
from loopq_compile.compiler import compile
from loopq_compile.errors import LoopQError
from loopq_compile.graph.device import CPU
from loopq_compile.graph.options import CalibrationOptions
from loopq_compile.graph.scheme import Scheme
from loopq_compile.memory import Peak
from loopq_compile.methods import get_pipeline
from loopq_compile.models import OuroConfig
from loopq_compile.pipeline import Pipeline, pass_name
from loopq_compile.processes import leads


@dataclass(frozen=True)
class Job:
    """What to calibrate.

    Args:
        config: configuration of an Ouro model, as `OuroConfig.to_dict` writes it.
        scheme, method: as for `loopq_compile.compile`.
        steps: optimizer steps over all phases.
        samples, length: calibration rows, and tokens in each.
        options: further options of `loopq_compile.compile`.
        out: folder for an ONNX file of the result, checked against the program; None for none.
        rehearse: only predict.
        processes: how many processes share the work.
        dtype: type of the model's weights: "float32", "bfloat16" or "float16".
    """

    config: dict[str, Any]
    scheme: str
    method: str
    steps: int
    samples: int
    length: int
    options: dict[str, Any]
    out: str | None = None
    rehearse: bool = False
    processes: int = 1
    dtype: str = "float32"


def measure(job: Job, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Starts this module as a process and returns its lines.

    Raises:
        LoopQError: the process failed, for instance for lack of memory.
    """
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(job.processes)]
    module = ["-m", "loopq_compile.bench.memory_session", json.dumps(asdict(job))]
    command = [sys.executable, *(launch if job.processes > 1 else []), *module]
    lines: list[dict[str, Any]] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        for line in process.stdout:
            lines.append(json.loads(line))
            say(f"{lines[-1]['pass']}: {lines[-1]['seconds']:.0f} s, {lines[-1]['peak'] / 2**20:,.0f} MiB")
        error = process.stderr.read()
    if process.returncode:
        last = (error.strip().splitlines() or [f"it was ended by signal {-process.returncode}"])[-1]
        raise LoopQError(f"The model could not be calibrated after {lines[-1]['pass'] if lines else 'nothing'}: {last}")
    return lines


class MeasuredPipeline(Pipeline):
    """A pipeline that tells the time and the peak of every pass.

    Args:
        pipeline: its passes.
        peak: since when memory counts.
        tell: called after every pass.
    """

    def __init__(self, pipeline: Pipeline, peak: Peak, tell: Callable[[dict[str, Any]], None]) -> None:
        super().__init__(pipeline, pipeline.name)
        self._peak, self._tell = peak, tell

    def _apply(self, item: Any, graph_module: Any, done: list[str], probe: Any) -> Any:
        self._peak.restart()
        start = time.perf_counter()
        result = super()._apply(item, graph_module, done, probe)
        self._tell(_line(pass_name(item), time.perf_counter() - start, self._peak.bytes()))
        return result


def run(job: Job, tell: Callable[[dict[str, Any]], None]) -> None:
    """Calibrates in this process, and tells what `measure` returns."""
    model = random_model(OuroConfig.from_dict(job.config), getattr(torch, job.dtype))
    weights = sum(p.numel() for p in model.model.layers.parameters() if p.ndim > 1)
    peak, start, peaks = Peak(CPU), time.perf_counter(), [0]
    tell({**_line("model", 0.0, peak.base), "weights": weights})
    generator = torch.Generator().manual_seed(0)
    vocabulary = job.config["vocab_size"]
    batches = [torch.randint(vocabulary, (1, job.length), generator=generator) for _ in range(job.samples)]
    options = {"steps": job.steps, **job.options}
    if job.rehearse:
        _rehearse(model, job, batches, options, peak, tell)
        return

    def tell_and_remember(line: dict[str, Any]) -> None:
        peaks.append(line["peak"])
        tell(line)

    program = compile(
        model,
        batches[0],
        scheme=job.scheme,
        method=MeasuredPipeline(get_pipeline(job.method), peak, tell_and_remember),
        calibration=batches,
        release_model=True,
        **options,
    )
    del model
    if job.out is not None:
        peak.restart()
        begun = time.perf_counter()
        program.export_onnx(job.out, target="onnxruntime", form="rolled", cache=True, head_bits=8)
        tell_and_remember(_line("export", time.perf_counter() - begun, peak.bytes()))
    tell(_line("all together", time.perf_counter() - start, max(peaks)))


def _rehearse(
    model: Any,
    job: Job,
    batches: list[torch.Tensor],
    options: dict[str, Any],
    peak: Peak,
    tell: Callable[[dict[str, Any]], None],
) -> None:
    scheme, pipeline = Scheme.parse(job.scheme), get_pipeline(job.method)
    found = estimate(capture(model, batches[0]), scheme, pipeline, batches, CalibrationOptions(**options), peak)
    assert found.seconds is not None
    for cost in found.passes[1:-1]:  # without capture and shapes
        tell(_line(cost.name, cost.seconds, cost.memory))
    tell(_line("all together", found.seconds, found.memory))


def _line(name: str, seconds: float, peak: int) -> dict[str, Any]:
    return {"pass": name, "seconds": seconds, "peak": peak}


def _tell(line: dict[str, Any]) -> None:
    peak = torch.tensor(line["peak"])
    largest([peak])
    if leads():
        print(json.dumps({**line, "peak": int(peak)}), flush=True)


if __name__ == "__main__":
    run(Job(**json.loads(sys.argv[1])), _tell)
    if dist.is_initialized():
        dist.destroy_process_group()
