"""The parts of `python -m tests.gpu`. Each takes a device and returns figures; it raises if a comparison fails.

`python -m tests.gpu.parts NAME DEVICE QUICK FILE` runs one and writes its figures.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import loopq_compile as lq
from loopq_compile import bundled
from tests.gpu import calibration

Figures = dict[str, Any]
ROOT = Path(__file__).parents[2]
KERNELS = "tests/backends/triton/interpreted"
_NO_TESTS = 5
"""Exit status of pytest where a share is empty."""
CLOSE = 0.03
"""Allowed difference of logits, as share of the largest: a sum that differs in its last bit can round a code the other
way, and later loops propagate this. The tests of the interpreter allow the same."""


def require(condition: bool, message: str) -> None:
    """Fails a part; unlike `assert` also under `python -O`."""
    if not condition:
        raise AssertionError(message)


def distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference as share of the largest expected number; both on the CPU, as float64."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return float((found - expected).abs().max() / expected.abs().max())


def run_tests(files: list[str], selection: str = "", shares: int = 1) -> Figures:
    """Runs files of tests, in processes side by side; what they print is in the error.

    Args:
        files: paths from the root.
        selection: which tests, as pytest's `-k`; "" for all.
        shares: processes for each file. Compiling kernels takes most of the time, on one core of the host.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "--maxfail=3"]
    command += ["-k", selection] if selection else []
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    running, figures, failed = {}, {}, []
    for file in files:
        for number in range(shares):
            share = {"LOOPQ_SHARE": f"{number}/{shares}"}
            options: Any = {"cwd": ROOT, "env": environment | share, "stdout": subprocess.PIPE, "text": True}
            name = f"{Path(file).stem} {number + 1}/{shares}"
            running[name] = subprocess.Popen([*command, file], stderr=subprocess.STDOUT, **options)
    for name, process in running.items():
        printed = process.communicate()[0].strip()
        figures[name] = printed.splitlines()[-1] if printed else ""
        if process.returncode not in (0, _NO_TESTS):
            failed.append(printed[-1500:])
    require(not failed, "\n".join(failed))
    require(any(" passed" in line for line in figures.values()), "no test ran")
    return figures


def kernels(device: str, quick: bool) -> Figures:
    """Every kernel against its definition, which runs on the CPU."""
    files = [f"{KERNELS}/test_{name}.py" for name in ("adapter", "cache", "linear", "quantize")]
    shares = 1 if quick else max(1, min(4, (os.cpu_count() or 1) // 4))
    return run_tests(files, "leading or any_order or one_token" if quick else "", shares)


@functools.cache
def program(scheme: str = "w4a4", method: str = "las") -> lq.Program:
    """The bundled model after a method that only measures ranges; made on the CPU."""
    batches = bundled.calibration_tokens(samples=8, length=64)
    return lq.compile(bundled.load_model(), batches[0], scheme=scheme, method=method, calibration=batches)


def text(length: int = 64, batch: int = 2) -> Tensor:
    """Token ids `[batch, length]` that no calibration here reads."""
    return bundled.calibration_tokens(samples=64, length=length, batch=batch)[-1]


def lowered(device: str, made: lq.Program, **options: Any) -> Any:
    """A program on kernels, or on their definitions where no kernel runs."""
    return made.lower("triton", **options) if device == "cuda" else made.lower("triton", fallback=True, **options)


def check_programs(device: str, quick: bool) -> Figures:
    """Lowered programs against the reference backend: tiny ones, and the bundled model."""
    figures = run_tests([f"{KERNELS}/test_program.py"], "loopq-w4a4 or called" if quick else "")
    if quick:
        return figures
    ids = text()
    for scheme in ("w4a4", "w4a8"):
        expected = program(scheme).lower("reference")(ids).logits
        found = lowered(device, program(scheme))(ids).logits.cpu()
        same = float((found.argmax(-1) == expected.argmax(-1)).double().mean())
        share = float((found - expected).abs().mean() / expected.abs().max())
        figures[f"bundled {scheme}"] = {"mean difference": share, "same most likely token": same}
        require(share < CLOSE / 10 and same > 0.95, f"bundled {scheme} differs: {figures[f'bundled {scheme}']}")
    return figures


def saved(device: str, quick: bool) -> Figures:
    """A folder of compiled kernels: loads, compiles nothing, and computes what lowering computes."""
    import triton

    from loopq_compile.backends.triton import load, save

    made, ids = tiny() if quick else program(), torch.ones(2, 9, dtype=torch.int64) if quick else text()
    architecture = _architecture(device)
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        report = save(made, folder, architectures=[architecture])
        figures = {"kernels": report.kernels, "bytes": report.bytes, "seconds to save": time.monotonic() - start}
        with tempfile.TemporaryDirectory() as cache:
            triton.knobs.cache.dir = cache
            missed: list[str] = []
            triton.knobs.compilation.listener = lambda *, src, cache_hit, **_: cache_hit or missed.append(src.name)
            start = time.monotonic()
            run = load(folder, fallback=device != "cuda", device=device)
            found = _logits(run(ids))
            figures["seconds to load and run"] = time.monotonic() - start
            require(not missed, f"compiled although the folder has kernels: {sorted(set(missed))}")
            far = distance(found, _logits(lowered(device, made)(ids)))
    figures["difference"] = far
    require(far <= 1e-6, f"the folder computes something else: {far}")
    return figures


def _architecture(device: str) -> int:
    if device != "cuda":
        return 90
    from loopq_compile.backends.triton.ahead import ARCHITECTURES

    major, minor = torch.cuda.get_device_capability()
    return max(known for known in ARCHITECTURES if known <= 10 * major + minor)


def _logits(result: Any) -> Tensor:
    return result["logits"] if isinstance(result, dict) else result.logits


def tiny() -> lq.Program:
    """The tiny looped model of the tests, in w4a4."""
    from tests.tiny import tiny_program

    return tiny_program("w4a4", "symmetric")


def static_decoding(device: str, quick: bool) -> Figures:
    """Steps in a CUDA graph against a growing cache: the same logits, prompts of several lengths, every cache."""
    from loopq_compile.generation.decoders import CachedDecoder

    made = tiny() if quick else program()
    ids = torch.arange(18).view(2, 9) if quick else text(32)
    prompt, figures = ids.shape[1] - 4, {}
    for bits, rolled in ((None, False), (8, True)) if quick else ((None, False), (8, False), (8, True), (4, True)):
        cached = made.with_cache(last_token=True, kv_bits=bits, stacked=rolled)
        run = lowered(device, cached, rolled=rolled)
        static = run.static_decoder(64, cuda_graph=device == "cuda").decoder()
        growing, farthest = CachedDecoder(run, run.signature, run.loops), 0.0
        for begin, end in ((0, prompt), *((n, n + 1) for n in range(prompt, ids.shape[1]))):
            mask = torch.ones(len(ids), end, dtype=torch.int64)
            one, other = (way(ids[:, begin:end].to(run.device), mask.to(run.device)) for way in (static, growing))
            farthest = max(farthest, distance(one, other))
        name = f"{bits or 'float'} bits, {'rolled' if rolled else 'unrolled'}"
        figures[name] = farthest
        require(farthest < CLOSE, f"{name}: logits differ by {farthest:.3g} of the largest")
    return figures


def products(device: str, quick: bool) -> Figures:
    """`bench kernels`: products of a layer of Ouro 1.4B against cuBLAS in bfloat16 and `torch._int_mm`."""
    from loopq_compile.bench import kernel_times
    from loopq_compile.bench.cells import Cells

    options: dict[str, Any] = {}
    if device != "cuda":
        options = {"timer": _clock, "device": "cpu", "rows": (1, 32), "products": ["attention out"]}
        options["runs"] = kernel_times.candidates(torch.ops.loopq.packed_linear.default)[:2]
    report = kernel_times.time_products(str(device), Cells(), **options)
    require(
        all(line["ms"] for line in report.data["rows"] if line["runs"] in (*kernel_times.OURS, kernel_times.BASELINE)),
        f"a kernel of ours was not timed: {report.to_markdown()}",
    )
    return {"rows": report.data["rows"]}


def _clock(function: Callable[[], Any]) -> float:
    """Milliseconds of one run, without a GPU."""
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


def tokens_per_second(device: str, quick: bool) -> Figures:
    """Decoding and reading of whole programs: the bundled model, and two layers of Ouro 1.4B with random weights."""
    from loopq_compile.bench import kernel_times

    options: dict[str, Any] = {} if device == "cuda" else {"timer": _clock, "fallback": True, "cuda_graph": False}
    made = {"tiny": tiny()} if quick else {"bundled": program(), "ouro-1.4b, 2 layers": wide(device)}
    figures: Figures = {}
    for name, each in made.items():
        figures[name] = [
            kernel_times.time_decoding(each, batch=batch, context=8 if quick else 128, kv_bits=bits, **options)
            for bits in (None, 8)
            for batch in ((1,) if quick else (1, 8))
        ]
        figures[f"{name}, generate"] = generated(device, each, 4 if quick else 64)
    return figures


def wide(device: str) -> lq.Program:
    """Layers as wide as those of Ouro 1.4B, four loops, w4a4."""
    from loopq_compile.bench.random_models import random_model, sized

    model = random_model(sized("ouro-1.4b", layers=2))
    return lq.compile(model, torch.ones(2, 8, dtype=torch.int64), scheme="w4a4", method="symmetric", device=device)


def generated(device: str, made: lq.Program, count: int) -> Figures:
    """Seconds of `generate` with a static decoder, sampling and host included; the second of two runs."""
    from loopq_compile.generation.sampling import generate

    run = lowered(device, made.with_cache(last_token=True))
    decoder = run.static_decoder(64 + count, cuda_graph=device == "cuda")
    ids = torch.ones(1, 16, dtype=torch.int64, device=run.device)
    for _ in range(2):
        start = time.perf_counter()
        generate(decoder, ids, count)
        seconds = time.perf_counter() - start
    return {"tokens": count, "seconds": seconds, "tokens per second": count / seconds}


FUNCTIONS: dict[str, Callable[[str, bool], Figures]] = {
    "kernels": kernels,
    "program": check_programs,
    "saved": saved,
    "static decoding": static_decoding,
    "calibration": calibration.compare,
    "products": products,
    "tokens per second": tokens_per_second,
}


def main() -> None:
    name, device, quick, file = sys.argv[1:]
    torch.manual_seed(0)
    Path(file).write_text(json.dumps(FUNCTIONS[name](device, quick == "1")))


if __name__ == "__main__":
    main()
