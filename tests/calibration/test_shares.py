"""Two processes that share the text of every pass."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch

import loopq_compile as lq
from loopq_compile.calibration import distributed
from loopq_compile.calibration.batches import spread
from loopq_compile.graph.state import get_state
from loopq_compile.processes import apart, leads
from tests.calibration.compiled import JOBS, compiled, tensors_of
from tests.tiny import tiny_model

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def torchrun(*arguments: str, processes: int = 2) -> str:
    """Runs Python with `arguments` in several processes; returns what they print."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", port]
    command = [sys.executable, *launch, "--no-python", sys.executable, *arguments]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder with what two processes compiled."""
    out = tmp_path_factory.mktemp("shared")
    torchrun("-m", "tests.calibration.compiled", str(out), json.dumps(JOBS))
    return out


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_compile_what_one_compiles(shared, name):
    """Activations have 8 or 16 bits: sums in another order must not change integers, on which everything depends."""
    one, two = compiled(JOBS[name]), lq.load(shared / f"{name}-0")
    ours, theirs = tensors_of(one), tensors_of(two)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, theirs[key], rtol=1e-4, atol=1e-5)
        else:
            assert float((tensor != theirs[key]).float().mean()) < 0.01, key
    tokens = {entry.pass_name: entry.notes for entry in one.log}
    assert tokens["collect-ranges"] == {entry.pass_name: entry.notes for entry in two.log}["collect-ranges"]
    chosen = [get_state(program.graph_module).results.get("slt", {}).get("selected") for program in (one, two)]
    assert chosen[0] == chosen[1]


def test_all_processes_hold_the_same_bits(shared):
    facts = [json.loads((shared / f"facts-{rank}.json").read_text()) for rank in (0, 1)]
    assert facts[0] == facts[1] and facts[0].keys() == JOBS.keys()


def test_only_the_first_process_writes(shared):
    folders = sorted(path.name for path in shared.iterdir() if path.is_dir())
    assert folders == sorted(f"{name}-0" for name in JOBS)


def test_each_process_keeps_its_rows_of_what_a_step_holds(tmp_path):
    """Gradients are those of a single process, and a killed calibration continues with the same numbers."""
    torchrun("-m", "tests.calibration.divided", str(tmp_path))
    for rank in (0, 1):
        fact = json.loads((tmp_path / f"facts-{rank}.json").read_text())
        assert fact["shares"] == dict.fromkeys(("numbers", "gradient", "sum"), 0.5)
        assert fact["error"] < 0.01


def test_the_command_line_speaks_once(tmp_path):
    command = ["compile", "bundled", "--out", str(tmp_path / "out"), "--samples", "4", "--length", "16", "--json"]
    options = ["--method", "smoothquant", "--scheme", "w8a8"]
    printed = json.loads(torchrun("-c", "from loopq_compile.cli import main; main()", *command, *options))
    assert printed["out"] == str(tmp_path / "out") and printed["bytes"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_statistics_come_from_all_of_the_text():
    batches = [torch.full((4, 8), number) for number in range(16)]
    found = spread([[batch] for batch in batches], 128)
    rows = torch.cat([batch[0] for batch in found])
    assert rows.shape == (16, 8) and rows[:, 0].tolist() == list(range(16))
    assert {len(batch[0]) for batch in found} == {4}, "batches stay as large as they were"
    assert spread([[batch] for batch in batches], 1 << 20) == [[batch] for batch in batches]


def test_rows_of_different_lengths_are_spread_by_tokens():
    batches = [[torch.zeros(2, length, dtype=torch.int64)] for length in (4, 8, 12, 40)]
    found = spread(batches, 64)
    assert sum(batch[0].numel() for batch in found) == 64
    assert {batch[0].shape[1] for batch in found} == {4, 8, 12, 40}


def test_the_number_of_tokens_is_an_option():
    rows = [torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(seed)) for seed in range(8)]
    program = lq.compile(tiny_model(), rows[0], method="las", scheme="w8a8", calibration=rows, statistics_tokens=128)
    assert {entry.pass_name: entry.notes for entry in program.log}["collect-ranges"] == ["128 tokens"]
    with pytest.raises(lq.LoopQError, match="statistics_tokens must be an integer of at least 1"):
        lq.compile(tiny_model(), rows[0], calibration=rows, statistics_tokens=0)


def test_batches_are_shared_out(monkeypatch):
    monkeypatch.setattr(distributed, "world", lambda device: (1, 2))
    batches = [[torch.full((2, 1), number)] for number in range(5)]
    assert [int(batch[0][0]) for batch in distributed.share(batches, torch.device("cpu"))] == [1, 3]
    assert [batch[0].tolist() for batch in distributed.share(batches[:1], torch.device("cpu"))] == [[[0]]]


def test_a_process_may_work_for_itself():
    with apart():
        assert distributed.world() == (0, 1)
    assert leads() and distributed.first("it") == "it"
