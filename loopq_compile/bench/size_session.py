"""`python -m loopq_compile.bench.size_session JSON`: compiles one model from end to end in a separate process.

Takes a `Job` as JSON and prints JSON: by step its `seconds`, those of the `processor`, and `peak`, the largest resident
size of the process so far in bytes.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

from loopq_compile.errors import LoopQError


@dataclass(frozen=True)
class Job:
    """What to compile.

    Args:
        config: configuration of an Ouro model, as `OuroConfig.to_dict` writes it.
        folder: folder for the file.
        scheme: scheme, compiled without data.
        head_bits, float_bits: options of the export.
        group_size: neighbouring features that share a scale.
    """

    config: dict[str, Any]
    folder: str
    scheme: str = "w4a4"
    head_bits: int | None = None
    float_bits: int = 32
    group_size: int = 32


def measure(job: Job) -> dict[str, dict[str, float]]:
    """Starts this module as a process and returns what it prints.

    Raises:
        LoopQError: the process failed, for instance for lack of memory.
    """
    command = [sys.executable, "-m", "loopq_compile.bench.size_session", json.dumps(asdict(job))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"it was ended by signal {-done.returncode}"])[-1]
        raise LoopQError(f"The model could not be compiled: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def run(job: Job) -> dict[str, dict[str, float]]:
    """Builds, compiles and exports the model in this process; what `measure` returns."""
    import torch

    from loopq_compile.bench.random_models import random_model
    from loopq_compile.compiler import compile
    from loopq_compile.graph.scheme import Scheme
    from loopq_compile.models import OuroConfig

    steps: dict[str, dict[str, float]] = {}
    start, used = time.perf_counter(), time.process_time()

    def done(step: str) -> None:
        nonlocal start, used
        now, spent = time.perf_counter(), time.process_time()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        steps[step] = {"seconds": now - start, "processor": spent - used, "peak": peak}
        start, used = now, spent

    model = random_model(OuroConfig.from_dict(job.config))
    done("random model")
    example = torch.ones(2, 8, dtype=torch.int64)
    scheme = Scheme.parse(job.scheme, group_size=job.group_size)
    program = compile(model, example, scheme=scheme, method="symmetric", release_model=True)
    del model
    done("capture and passes")
    options: dict[str, Any] = {"target": "onnxruntime", "form": "rolled", "cache": True, "last_token": True}
    program.export_onnx(job.folder, head_bits=job.head_bits, float_bits=job.float_bits, **options)
    done("export")
    return steps


if __name__ == "__main__":
    print(json.dumps(run(Job(**json.loads(sys.argv[1])))))
