"""`python -m loopq_compile.bench.session FILE LENGTH`: the cost of one ONNX file in a separate process.

Prints JSON: `load_ms` to open it, `memory` in bytes that opening and one call added to the resident size, and
`call_ms`, the median of some calls with `1 x LENGTH` tokens. One thread.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from loopq_compile.errors import LoopQError

_CALLS = 9


def measure(file: Path, length: int) -> dict[str, Any]:
    """Starts this module as a process and returns what it prints.

    Raises:
        LoopQError: the process failed.
    """
    command = [sys.executable, "-m", "loopq_compile.bench.session", str(file), str(length)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise LoopQError(f"ONNX Runtime could not open or run {file}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def resident() -> int:
    """Resident size of this process in bytes; 0 on systems other than Linux."""
    return _status("VmRSS")


def peak() -> int:
    """The largest resident size of this process so far in bytes; 0 on systems other than Linux."""
    return _status("VmHWM")


def _status(field: str) -> int:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    line = next(line for line in status.splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _main(file: Path, length: int) -> None:
    import torch

    from loopq_compile.backends.onnx import OnnxExecutable

    ids = torch.ones(1, length, dtype=torch.int64)
    before, start = resident(), time.perf_counter()
    run = OnnxExecutable(file, threads=1)
    loaded = time.perf_counter() - start
    run(ids)
    memory, times = resident() - before, []
    for _ in range(_CALLS):
        start = time.perf_counter()
        run(ids)
        times.append(time.perf_counter() - start)
    print(json.dumps({"load_ms": loaded * 1e3, "memory": memory, "call_ms": statistics.median(times) * 1e3}))


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]))
