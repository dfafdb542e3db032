"""`python -m loopq_compile.bench.speed_reference JOB FILE`: the float32 model's logits for the text of a `Job`.

Contestants of `bench speed` compare theirs with them, each in its own process.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from loopq_compile.bench.processes import run_module
from loopq_compile.bench.speed_fidelity import rows
from loopq_compile.bench.speed_session import Job, from_json, load
from loopq_compile.evaluation.perplexity import logits_caller


def write_reference(job: Job, file: Path) -> None:
    """Writes logits `[rows, tokens, vocabulary]` as a `.npy` file, in a process of its own.

    Raises:
        LoopQError: the process failed.
    """
    run_module("speed_reference", json.dumps(asdict(job)), str(file), failed=f"{job.model} could not read the text")


def _main(job: Job, file: str) -> None:
    torch.set_num_threads(1)
    read = logits_caller(load(job))
    np.save(file, np.concatenate([read(row[None]).numpy() for row in rows(job.text)]))


if __name__ == "__main__":
    _main(from_json(sys.argv[1]), sys.argv[2])
