"""`python -m loopq_compile.bench.speed_session JSON [LOGITS]`: how fast one model reads and writes text.

Runs in a separate process. Takes a `Job` as JSON and prints JSON: `load_ms`; `memory` and `peak`, the bytes that
loading and running added to the resident size, at the end and at most; `first_s`, by how many seconds first calls took
longer than second ones, mostly the time of `torch.compile`; `prefill`, tokens per second by length of a prompt;
`decode`, tokens per second by batch. One thread; the best of several runs, because a machine is never quite idle.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loopq_compile.bench import speed_llamacpp, speed_openvino
from loopq_compile.bench.processes import run_module
from loopq_compile.bench.session import peak, resident
from loopq_compile.bench.speed_fidelity import ROW, divergence
from loopq_compile.errors import first_line
from loopq_compile.generation.decoders import Decoder


@dataclass(frozen=True)
class Job:
    """What to measure.

    Args:
        model: what `loopq_compile.sources.loading.load_model` takes, or the file of a contestant.
        way: how PyTorch runs the model, one of `speed_torch.WAYS`; "" for an ONNX file in ONNX Runtime; of rivals, a
            name from `speed_openvino.WAYS` or `speed_llamacpp.WAY`.
        config: configuration of an Ouro model with random weights, as `OuroConfig.to_dict` writes it; None for the
            model by name.
        prefill: lengths of prompts, one row.
        decode: batch sizes, each after a prompt of `context` tokens, for `steps` tokens.
        repeats: number of runs, of which the fastest counts.
        text: token ids on which a contestant is compared with the model; none compares nothing.
        trust_remote_code, allow_pickle: for Hugging Face models, as in `load_model`.
    """

    model: str
    way: str = ""
    config: dict[str, Any] | None = None
    prefill: tuple[int, ...] = (128, 512)
    decode: tuple[int, ...] = (1, 8)
    context: int = 128
    steps: int = 16
    repeats: int = 3
    text: tuple[int, ...] = ()
    trust_remote_code: bool = False
    allow_pickle: bool = False


def measure(job: Job, reference: Path | None = None) -> dict[str, Any]:
    """Starts this module as a process and returns what it prints.

    Args:
        job: what to measure.
        reference: the model's logits for the job's text; None compares nothing.

    Raises:
        LoopQError: the process failed or crashed.
    """
    arguments = [json.dumps(asdict(job)), *([str(reference)] if reference else [])]
    with tempfile.TemporaryDirectory() as cache:  # the cache of an earlier run would make torch.compile look fast
        environment = {"TORCHINDUCTOR_CACHE_DIR": cache}
        failed = f"{Path(job.model).name} could not be measured"
        return json.loads(run_module("speed_session", *arguments, failed=failed, environment=environment))


def from_json(text: str) -> Job:
    """The job that `json.dumps(asdict(job))` wrote."""
    given: dict[str, Any] = json.loads(text)
    given |= {key: tuple(value) for key, value in given.items() if isinstance(value, list)}
    return Job(**given)


def _load(job: Job) -> Callable[[], Decoder]:
    """Loads the model; returns a function that makes fresh decoders."""
    if not job.way:
        from loopq_compile.backends.onnx import OnnxExecutable

        return OnnxExecutable(job.model, threads=1).decoder
    if job.way in speed_openvino.WAYS:
        return speed_openvino.decoders(Path(job.model), job.way)
    if job.way == speed_llamacpp.WAY:
        return speed_llamacpp.decoders(Path(job.model), longest(job))
    from loopq_compile.bench.speed_torch import WAYS, decoders

    way = WAYS[job.way]
    return decoders(load(job, way.dtype), way)


def longest(job: Job) -> int:
    """Tokens of the longest row that a contestant reads."""
    return max(job.context + job.steps, min(ROW, len(job.text)), *job.prefill)


def load(job: Job, dtype: str = "float32") -> nn.Module:
    """The job's model in floating point.

    Raises:
        LoopQError: there is no such model, or it cannot be read.
    """
    if job.config is not None:
        from loopq_compile.bench.random_models import random_model
        from loopq_compile.models import OuroConfig

        return random_model(OuroConfig.from_dict(job.config), getattr(torch, dtype))
    from loopq_compile.sources.loading import load_model

    options: Any = {"trust_remote_code": job.trust_remote_code, "allow_pickle": job.allow_pickle}
    return load_model(job.model, dtype=dtype, **options).model.to(getattr(torch, dtype)).eval()


def _main(job: Job, reference: str | None = None) -> None:
    torch.set_num_threads(1)
    before, start = resident(), time.perf_counter()
    decoder = _load(job)
    loaded = time.perf_counter() - start
    compiled = []

    def seconds(run: Callable[[], float]) -> float:
        """The fastest run, after one that does not count because `torch.compile` works in it."""
        began = time.perf_counter()
        run()
        middle = time.perf_counter()
        found = [run()]
        compiled.append(middle - began - (time.perf_counter() - middle))
        return min(found + [run() for _ in range(job.repeats - 1)])

    with torch.no_grad():
        prefill = {n: n / seconds(partial(_prefill, decoder, n)) for n in job.prefill}
        decode = {n: n / seconds(partial(_decode, decoder, job, n)) for n in job.decode}
    values: dict[str, Any] = {"load_ms": loaded * 1e3, "memory": resident() - before, "peak": peak() - before}
    values |= {"first_s": max(0.0, sum(compiled)), "prefill": prefill, "decode": decode}
    if reference is not None:
        with torch.no_grad():
            values["kl"] = divergence(decoder, job.text, Path(reference))
    print(json.dumps(values))


def _ids(batch: int, length: int) -> Tensor:
    return torch.randint(5, 500, (batch, length), generator=torch.Generator().manual_seed(0))


def _prefill(make: Callable[[], Decoder], length: int) -> float:
    """Seconds for a prompt of `length` tokens."""
    decoder, ids = make(), _ids(1, length)
    start = time.perf_counter()
    decoder(ids, torch.ones_like(ids))
    return time.perf_counter() - start


def _decode(make: Callable[[], Decoder], job: Job, batch: int) -> float:
    """Seconds for one step of `batch` rows."""
    decoder, ids = make(), _ids(batch, job.context)
    mask = torch.ones(batch, job.context + job.steps, dtype=torch.int64)
    with torch.compiler.set_stance("force_eager"):  # this call is not timed, so it is not compiled
        decoder(ids, mask[:, : job.context])
    start = time.perf_counter()
    for step in range(1, job.steps + 1):
        decoder(ids[:, :1], mask[:, : job.context + step])
    return (time.perf_counter() - start) / job.steps


if __name__ == "__main__":
    try:
        _main(from_json(sys.argv[1]), *sys.argv[2:])
    except Exception as error:  # a rival may raise anything: one line for the table
        sys.exit(f"{type(error).__name__}: {first_line(error)}")
