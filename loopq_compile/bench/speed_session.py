"""`python -m loopq_compile.bench.speed_session JSON`: how fast one model reads and writes text.

Runs in a process of its own. Takes a `Job` as JSON and prints JSON: `load_ms`; `memory`, the bytes that loading and
running added to the resident size; `prefill`, tokens a second by length of a prompt; `decode`, tokens a second by
batch. One thread; the best of several runs, because a machine is never quite free.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loopq_compile.bench.session import resident
from loopq_compile.decoding import Decoder, logits_of
from loopq_compile.errors import LoopQError


@dataclass(frozen=True)
class Job:
    """What to measure.

    Args:
        model: what `loopq_compile.loading.load_model` takes, or an ONNX file.
        dtype: of a PyTorch model: "float32" or "bfloat16"; "" for an ONNX file.
        prefill: lengths of prompts, one row.
        decode: batch sizes, each behind a prompt of `context` tokens, for `steps` tokens.
        repeats: runs, of which the fastest counts.
        trust_remote_code, allow_pickle: for Hugging Face models, as in `load_model`.
    """

    model: str
    dtype: str = ""
    prefill: tuple[int, ...] = (128, 512)
    decode: tuple[int, ...] = (1, 8)
    context: int = 128
    steps: int = 16
    repeats: int = 3
    trust_remote_code: bool = False
    allow_pickle: bool = False


def measure(job: Job) -> dict[str, Any]:
    """What this module prints, of a process started for it.

    Raises:
        LoopQError: the process failed.
    """
    command = [sys.executable, "-m", "loopq_compile.bench.speed_session", json.dumps(asdict(job))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise LoopQError(f"{job.model} could not be measured: {last}")
    return json.loads(done.stdout.splitlines()[-1])


class _HuggingFaceDecoder:
    """A Hugging Face model with its own cache."""

    def __init__(self, model: Any) -> None:
        self.model, self.past = model, None

    def __call__(self, new_ids: Tensor, attention_mask: Tensor) -> Tensor:
        given = {"attention_mask": attention_mask, "past_key_values": self.past, "use_cache": True}
        output = self.model(new_ids, logits_to_keep=1, **given)
        self.past = output.past_key_values
        return logits_of(output)[:, -1]


def _load(job: Job) -> Callable[[], Decoder]:
    """Gives fresh decoders of the model."""
    if not job.dtype:
        from loopq_compile.backends.onnx import OnnxExecutable

        return OnnxExecutable(job.model, threads=1).decoder
    from loopq_compile.loading import load_model

    options: Any = {"trust_remote_code": job.trust_remote_code, "allow_pickle": job.allow_pickle}
    model: nn.Module = load_model(job.model, dtype=job.dtype, **options).model.to(getattr(torch, job.dtype)).eval()
    if hasattr(model, "prepare_inputs_for_generation"):
        return lambda: _HuggingFaceDecoder(model)
    from loopq_compile.capture import capture
    from loopq_compile.program import Program

    return Program(capture(model, torch.ones(2, 8, dtype=torch.int64))).decoder


def _main(job: Job) -> None:
    torch.set_num_threads(1)
    before, start = resident(), time.perf_counter()
    decoder = _load(job)
    loaded = time.perf_counter() - start
    with torch.no_grad():
        prefill = {n: n / _best(job, partial(_prefill, decoder, n)) for n in job.prefill}
        decode = {n: n / _best(job, partial(_decode, decoder, job, n)) for n in job.decode}
    memory = resident() - before
    print(json.dumps({"load_ms": loaded * 1e3, "memory": memory, "prefill": prefill, "decode": decode}))


def _best(job: Job, run: Callable[[], float]) -> float:
    return min(run() for _ in range(job.repeats))


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
    decoder(ids, mask[:, : job.context])
    start = time.perf_counter()
    for step in range(1, job.steps + 1):
        decoder(ids[:, :1], mask[:, : job.context + step])
    return (time.perf_counter() - start) / job.steps


if __name__ == "__main__":
    given: dict[str, Any] = json.loads(sys.argv[1])
    lists: dict[str, Any] = {key: tuple(value) for key, value in given.items() if isinstance(value, list)}
    _main(Job(**(given | lists)))
