"""Runs the tests in `simulated`, in a process where PyTorch knows a simulated accelerator."""

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "simulated"


def test_programs_on_a_simulated_accelerator():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(FOLDER)]
    environment = os.environ | {"LOOPQ_SIMULATED": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=FOLDER.parents[1])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
