"""Calibration on a device against the CPU: the bundled model, every method, 20 steps.

Both sides start from the same numbers, and both programs are then measured on the CPU. They are not equal: sums in
another order differ in their last bits, a value halfway between two integers rounds the other way, and every step
builds on the one before.

On the CPU, two builds of PyTorch's kernels (ATEN_CPU_CAPABILITY=default and AVX-512) differ as two devices do. The
divergences of their programs differed by at most 0.8 % for methods that learn nothing, and by 0.6 to 3.6 % for those
that learn. About three times the largest is allowed. Learning halves the divergence, so steps that do nothing, or
wrong gradients, do not pass.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import loopq_compile as lq
from loopq_compile import bundled
from loopq_compile.capture.to_graph import capture
from loopq_compile.compiler import quantize
from loopq_compile.graph.copies import copy_on
from loopq_compile.graph.options import CalibrationOptions
from loopq_compile.methods import METHODS

ROOT = Path(__file__).parents[2]
TOLERANCE = 0.10
"""Allowed difference of the two divergences, as share of that of the CPU."""
STEPS, QUICK_STEPS = 20, 2
QUICK_METHODS = ["symmetric", "loopq"]


def compare(device: str, quick: bool) -> dict[str, Any]:
    """Divergence from full precision of every method, calibrated on the CPU and on the device.

    Returns:
        By method: `cpu` and `device`, nats per token; `cpu seconds` and `device seconds`.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = {where: Path(folder) / f"{where}.pt" for where in ("cpu", "device")}
        command = [sys.executable, "-m", "tests.gpu.calibration"]
        started = {
            where: subprocess.Popen(
                [*command, device if where == "device" else "cpu", str(int(quick)), str(file)],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for where, file in files.items()
        }
        printed = {where: process.communicate()[0] for where, process in started.items()}
        for where, process in started.items():
            if process.returncode:
                raise AssertionError(f"calibration on {where} failed:\n{printed[where][-2500:]}")
        found = {where: torch.load(file, weights_only=True) for where, file in files.items()}
    figures = {
        method: {
            **{where: found[where][method]["divergence"] for where in files},
            **{f"{where} seconds": found[where][method]["seconds"] for where in files},
        }
        for method in found["cpu"]
    }
    wrong = [name for name, x in figures.items() if not abs(x["device"] - x["cpu"]) <= TOLERANCE * x["cpu"]]
    if wrong:
        raise AssertionError(f"the device calibrates to another result: { ({name: figures[name] for name in wrong}) }")
    return figures


def calibrate(device: str, quick: bool) -> dict[str, dict[str, float]]:
    """Runs every method on a device, and measures its program on the CPU; seconds and divergence by method."""
    where = torch.device(device)
    if device == "sim":
        from tests.simulated.device import DEVICE as where
    batches = bundled.calibration_tokens(samples=4 if quick else 16, length=16 if quick else 32)
    text = bundled.calibration_tokens(samples=64, length=64)[-2 if quick else 8 :]
    model = bundled.load_model()
    captured = capture(model, batches[0])
    options = CalibrationOptions(steps=QUICK_STEPS if quick else STEPS, evaluate_every=10, fused="off")
    found = {}
    for method in QUICK_METHODS if quick else METHODS:
        start = time.perf_counter()
        pipeline = lq.pipelines.get_pipeline(method)
        program = quantize(copy_on(captured, where), lq.Scheme.parse("w4a4"), pipeline, batches, options)
        seconds = time.perf_counter() - start
        found[method] = {"divergence": divergence(program.to("cpu"), model, text), "seconds": seconds}
        print(method, found[method], flush=True)
    return found


@torch.no_grad()
def divergence(program: lq.Program, model: Any, text: list[Tensor]) -> float:
    """KL divergence of the program's predictions from the model's, in nats per token."""
    total = 0.0
    for ids in text:
        one, other = (torch.log_softmax(run(ids).logits.double(), -1) for run in (model, program))
        total += float((one.exp() * (one - other)).sum())
    return total / sum(ids.numel() for ids in text)


def main() -> None:
    device, quick, file = sys.argv[1:]
    if device == "sim":
        from tests.simulated.device import simulated

        with simulated():
            found = calibrate(device, quick == "1")
    else:
        found = calibrate(device, quick == "1")
    torch.save(found, file)


if __name__ == "__main__":
    main()
