"""What the entry point of the command line does before anything else."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from loopq_compile.cli import WAIT_POLICY

SCRIPT = """
import os, sys
from loopq_compile import cli
assert "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ, "importing the package changes nothing"
sys.argv = ["loopq-compile", "--version"]
try:
    cli.main()
finally:
    print(os.environ.get("OMP_WAIT_POLICY"), "torch" in sys.modules)
"""


@pytest.mark.parametrize(
    ("chosen", "policy"),
    [({}, "PASSIVE"), ({"GOMP_SPINCOUNT": "1000"}, "None"), ({"KMP_BLOCKTIME": "200"}, "None")],
)
def test_threads_wait_passively_where_nobody_chose(chosen: dict[str, str], policy: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in WAIT_POLICY} | chosen
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split("\n")[-2] == f"{policy} False"


def test_the_users_policy_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    from loopq_compile.cli import wait_passively

    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    wait_passively()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
