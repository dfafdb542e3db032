"""Measuring in processes of their own, so that one that crashes ends alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping

from loopq_compile.errors import LoopQError


def run_module(name: str, *arguments: str, failed: str, environment: Mapping[str, str] | None = None) -> str:
    """Runs `python -m loopq_compile.bench.NAME` and returns the last line that it prints; empty if it prints nothing.

    Args:
        name: the module.
        arguments: of the command line.
        failed: begins the error, such as "x could not be measured".
        environment: further variables.

    Raises:
        LoopQError: the process failed, with its last word, or was ended by a signal, with its name.
    """
    command = [sys.executable, "-m", f"loopq_compile.bench.{name}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | dict(environment or {}))
    if done.returncode < 0:  # what it wrote before is not the reason
        raise LoopQError(f"{failed}: the process crashed ({signal.Signals(-done.returncode).name})")
    if done.returncode:
        raise LoopQError(f"{failed}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return (done.stdout.strip().splitlines() or [""])[-1]
