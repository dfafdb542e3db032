"""`python -m loopq_compile.bench.memory_session JSON`: calibrates one model in a separate process.

Takes a `Job` as JSON. Prints a line of JSON for every pass: its name, `seconds`, and `peak`, the largest resident size
while it ran minus what was resident before the first pass, in bytes. The line of the model comes first. Under
`torchrun` the first process prints, and a peak is the largest of all processes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from loopq_compile.bench.random_models import random_model
from loopq_compile.calibration.distributed import largest
from loopq_compile.compiler import compile
from loopq_compile.errors import LoopQError
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
        processes: how many processes share the work.
    """

    config: dict[str, Any]
    scheme: str
    method: str
    steps: int
    samples: int
    length: int
    options: dict[str, Any]
    out: str | None = None
    processes: int = 1


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


class Peak:
    """The largest resident size of this process since the last `restart`; Linux only."""

    def __init__(self) -> None:
        self.base = psutil.Process().memory_info().rss

    def restart(self) -> None:
        """Forgets what was before."""
        Path("/proc/self/clear_refs").write_text("5")

    def bytes(self) -> int:
        """The peak, without what was resident at first."""
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024 - self.base


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
        self._tell({"pass": pass_name(item), "seconds": time.perf_counter() - start, "peak": self._peak.bytes()})
        return result


def run(job: Job, tell: Callable[[dict[str, Any]], None]) -> None:
    """Calibrates in this process, and tells what `measure` returns."""
    model = random_model(OuroConfig.from_dict(job.config))
    layers = model.model.layers
    weights = sum(p.numel() for p in layers.parameters() if p.ndim > 1)
    peak, start = Peak(), time.perf_counter()
    tell({"pass": "model", "seconds": 0.0, "peak": peak.base, "weights": weights})
    generator = torch.Generator().manual_seed(0)
    vocabulary = job.config["vocab_size"]
    batches = [torch.randint(vocabulary, (1, job.length), generator=generator) for _ in range(job.samples)]
    program = compile(
        model,
        batches[0],
        scheme=job.scheme,
        method=MeasuredPipeline(get_pipeline(job.method), peak, tell),
        calibration=batches,
        **{"steps": job.steps, "release_model": True, **job.options},
    )
    del model
    if job.out is not None:
        peak.restart()
        begun = time.perf_counter()
        program.export_onnx(job.out, target="onnxruntime", form="rolled", cache=True, head_bits=8)
        tell({"pass": "export", "seconds": time.perf_counter() - begun, "peak": peak.bytes()})
    tell({"pass": "all together", "seconds": time.perf_counter() - start, "peak": peak.bytes()})


def _tell(line: dict[str, Any]) -> None:
    peak = torch.tensor(line["peak"])
    largest([peak])
    if leads():
        print(json.dumps({**line, "peak": int(peak)}), flush=True)


if __name__ == "__main__":
    run(Job(**json.loads(sys.argv[1])), _tell)
    if dist.is_initialized():
        dist.destroy_process_group()
