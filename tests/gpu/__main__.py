"""Acceptance on a GPU, from a checkout, without network: at most eight minutes.

    python -m tests.gpu --out gpu.json                       # everything
    python -m tests.gpu kernels calibration --out gpu.json   # some parts
    python -m tests.gpu --device cpu --quick --out cpu.json  # what can be shown without a GPU

Needs torch, triton, transformers, safetensors, numpy and pytest. Every part runs in a process of its own, so a fault on
the GPU ends only that part. A part that begins after the time is over is "not run". Exit status 0 means that
all parts passed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PARTS = {
    "kernels": 200,
    "program": 90,
    "saved": 90,
    "static decoding": 90,
    "calibration": 240,
    "products": 120,
    "tokens per second": 120,
}
"""Parts in their order, and the seconds that each may take."""
INTERPRETED = ("kernels", "program")
"""Parts that run kernels in Triton's interpreter on the CPU."""
PACKAGES = "torch", "triton", "transformers", "safetensors", "numpy", "pytest", "onnxruntime", "onnx"


def versions() -> dict[str, str]:
    """Releases of Python and of what is installed here."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def card(device: str) -> str:
    """Name of the device, asked in another process: this one never holds memory of a GPU."""
    if device != "cuda":
        return f"none ({device})"
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'none')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return done.stdout.strip() or "none"


def run(name: str, device: str, quick: bool, seconds: float) -> dict[str, Any]:
    """Runs a part: its name, state, seconds, figures and error.

    Args:
        name: a key of `PARTS`.
        device: where it runs.
        quick: whether a few cases are enough.
        seconds: after which it is ended.
    """
    part: dict[str, Any] = {"name": name, "state": "not run", "seconds": 0.0, "figures": {}, "error": ""}
    if seconds <= 0:
        return part | {"error": "The time was over before this part began."}
    environment = os.environ | {"LOOPQ_KERNELS": device}
    if device == "cpu" and name in INTERPRETED:
        environment["TRITON_INTERPRET"] = "1"
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "figures.json"
        command = [sys.executable, "-m", "tests.gpu.parts", name, device, str(int(quick)), str(result)]
        streams: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **streams)
        try:
            printed, _ = process.communicate(timeout=seconds)
            part["state"] = "failed" if process.returncode else "passed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
            printed, _ = process.communicate()
            part["state"], printed = "failed", f"{printed}\nended after {seconds:.3g} seconds"
        if result.exists():
            part["figures"] = json.loads(result.read_text())
    if part["state"] == "failed":
        part["error"] = "\n".join(printed.strip().splitlines()[-25:])
    return part | {"seconds": round(time.monotonic() - start, 1)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="PART", help=f"parts, by default all: {', '.join(PARTS)}")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="where the JSON goes")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu", "sim"], help="sim: a simulated accelerator")
    parser.add_argument("--seconds", type=float, default=480, help="time for all parts together")
    parser.add_argument("--quick", action="store_true", help="a few cases of every part")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(PARTS):
        parser.error(f"unknown part {sorted(unknown)[0]!r}; known are {', '.join(PARTS)}")
    start = time.monotonic()
    report: dict[str, Any] = {"card": card(options.device), "device": options.device, "versions": versions()}
    report |= {"quick": options.quick, "parts": []}
    for name in options.names or PARTS:
        left = options.seconds - (time.monotonic() - start)
        part = run(name, options.device, options.quick, min(PARTS[name], left))
        report["parts"].append(part)
        report["passed"] = all(done["state"] == "passed" for done in report["parts"])
        report["seconds"] = round(time.monotonic() - start, 1)
        options.out.write_text(json.dumps(report, indent=1) + "\n")
        print(f"{part['state']:8} {part['seconds']:6.1f} s  {name}", flush=True)
        if part["error"]:
            print("    " + part["error"].replace("\n", "\n    "), flush=True)
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
