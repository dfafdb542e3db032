"""The best state waits on disk if it is large, and is the same when it is read."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loopq_compile.calibration import best_state
from loopq_compile.calibration.best_state import on_disk

STATE = {"offsets": torch.arange(64, dtype=torch.float16).view(8, 8), "zeros": torch.zeros(1, 1).expand(8, 8)}


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch):
    monkeypatch.setattr(best_state, "MEMORY_BYTES", 0)


def test_the_state_comes_back_and_leaves_no_file(tmp_path):
    found = on_disk(STATE, tmp_path)
    assert not list(tmp_path.iterdir()), "the file is gone while its tensors live"
    for name, tensor in STATE.items():
        assert found[name].equal(tensor) and found[name].dtype == tensor.dtype
        assert found[name].data_ptr() != tensor.data_ptr()


def test_small_states_stay_where_they_are(monkeypatch, tmp_path):
    monkeypatch.setattr(best_state, "MEMORY_BYTES", 1 << 20)
    assert all(on_disk(STATE, tmp_path)[name] is tensor for name, tensor in STATE.items())


def test_a_full_disk_costs_memory_and_nothing_else(monkeypatch, tmp_path):
    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(best_state, "save_file", full)
    assert all(on_disk(STATE, tmp_path)[name] is tensor for name, tensor in STATE.items())
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells resident memory")
def test_what_waits_takes_no_memory():
    code = """
import torch
from loopq_compile.calibration.best_state import on_disk
from loopq_compile.memory import Peak
state = {"a": torch.ones(1 << 26, dtype=torch.float16)}
peak = Peak(torch.device("cpu"))
kept = on_disk(state, None)
state.clear()
print(peak.now() >> 20)
assert kept["a"].sum(dtype=torch.float32) == 1 << 26
print(peak.now() >> 20)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    waiting, read = map(int, done.stdout.split())
    assert waiting < -96 and read > waiting + 96, "128 MiB are freed, and come back with the first look"
