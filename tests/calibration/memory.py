"""`python -m tests.calibration.memory [LOOPS ...]`: memory of a calibration step, by number of loops.

For each number of loops, a separate process does two steps of the tiny model (8 x 256 tokens) with and without
recomputation. It prints the bytes that the forward pass keeps for the backward pass, and the peak of resident memory.
"""

from __future__ import annotations

import resource
import subprocess
import sys

import torch
from torch import Tensor, fx

from loopq_compile.calibration.student import Student
from tests.calibration.tools import learned_tensors, prepared
from tests.tiny import tokens


def saved_bytes(graph_module: fx.GraphModule, inputs: Tensor, recompute: bool) -> int:
    """Bytes of distinct tensors that one forward pass keeps for its backward pass, without constants."""
    student = Student(graph_module, [], recompute)
    leaves = {name: tensor.requires_grad_() for name, tensor in learned_tensors(graph_module).items()}
    alive: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if inputs.shape[1] in tensor.shape:
            alive[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results, _ = student.run([inputs], leaves)
    total = sum(alive.values())
    results[0].square().mean().backward()
    return total


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        loops, recompute = int(sys.argv[2]), sys.argv[3] == "on"
        graph_module, inputs = prepared(loops=loops), tokens(0, 8, 253)
        kept = [saved_bytes(graph_module, inputs, recompute) for _ in range(2)][-1]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"| {loops} | {'on' if recompute else 'off'} | {kept / 2**20:.1f} | {peak / 2**10:.0f} |", flush=True)
        return
    print("| loops | recompute | kept for the backward pass, MiB | peak of the process, MiB |")
    print("| ---: | --- | ---: | ---: |", flush=True)
    for loops in map(int, sys.argv[1:] or ("2", "4", "8")):
        for recompute in ("off", "on"):
            command = [sys.executable, "-m", "tests.calibration.memory", "--one", str(loops), recompute]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
