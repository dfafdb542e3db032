"""`python -m tests.calibration.compiled OUT JOBS`: compiles the tiny model in each of several ways.

JOBS is JSON: options of `compile` by name. Each program goes to `OUT/NAME-RANK`. `OUT/facts-RANK.json` has, by name, a
hash of the tensors of the program in this process.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import loopq_compile as lq
from loopq_compile.processes import barrier, world
from tests.tiny import tiny_model, tokens

JOBS: dict[str, dict[str, Any]] = {
    "gptq": {"method": "las", "scheme": "w4a8", "activation": "static", "weight_solver": "gptq"},
    "loaq": {"method": "smoothquant", "scheme": "w4a8", "weight_solver": "loaq"},
    "loopq": {"method": "loopq", "scheme": "w3a16", "steps": 4, "evaluate_every": 2},
}


def compiled(options: dict[str, Any]) -> lq.Program:
    """The tiny model, compiled with some options."""
    batches = [tokens(seed, 4) for seed in range(6)]
    return lq.compile(tiny_model(2, 1), tokens(), calibration=batches, group_size=16, validation=0.34, **options)


def tensors_of(program: lq.Program) -> dict[str, Tensor]:
    """Every stored tensor by name."""
    return dict(program.graph_module.state_dict())


def _hash(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    out, jobs = Path(sys.argv[1]), json.loads(sys.argv[2])
    facts, rank = {}, world()[0]
    for name, options in jobs.items():
        program = compiled(options)
        program.save(out / f"{name}-{rank}")
        facts[name] = _hash(tensors_of(program))
    (out / f"facts-{rank}.json").write_text(json.dumps(facts))
    barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
