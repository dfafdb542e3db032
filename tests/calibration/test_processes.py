"""Calibrations in separate processes: one that the system kills, and two that share the work."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import loopq_compile as lq
from loopq_compile.calibration import distributed
from loopq_compile.passes.learn.calibrate import Calibrate
from tests.calibration.tools import assert_same, learned_tensors, prepared

OPTIONS = {"steps": 6, "evaluate_every": 2, "checkpoint_every": 1, "refresh": 2}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}


@pytest.fixture(scope="module")
def whole():
    """What an undisturbed calibration in one process learns."""
    return learned_tensors(prepared(Calibrate(), **OPTIONS))


def test_a_process_killed_by_the_system_goes_on_with_the_same_numbers(tmp_path, whole):
    store, out = tmp_path / "store", tmp_path / "out.safetensors"
    options = json.dumps({**OPTIONS, "checkpoint": str(store)})
    command = [sys.executable, "-m", "tests.calibration.once", str(out), options]
    process = subprocess.Popen(command, env=ENVIRONMENT)
    while process.poll() is None and not list(store.glob("*.safetensors")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not out.exists(), "killed before it was done"
    subprocess.run(command, env=ENVIRONMENT, check=True)
    assert_same(load_file(out), whole)


def test_two_processes_learn_what_one_learns(tmp_path):
    """With unquantized activations: a different last bit would change four-bit codes, and these all later steps."""
    options, out = {**OPTIONS, "scheme": "w3a16"}, tmp_path / "out.safetensors"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port]
    command = [sys.executable, *launch, "-m", "tests.calibration.once", str(out), json.dumps(options)]
    subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True)
    one = learned_tensors(prepared(Calibrate(), **options))
    shared = load_file(out)
    assert shared.keys() == one.keys()
    differences = torch.cat([(tensor - shared[name]).abs().flatten() for name, tensor in one.items()])
    # Where a true gradient is near zero, a step of rounding (3e-3) follows the sign of its noise; all else agrees.
    assert float((differences > 1e-3).float().mean()) < 0.12 and float(differences.max()) < 0.05
    start = learned_tensors(prepared(scheme="w3a16"))
    changed = torch.cat([(tensor - start[name]).abs().flatten() for name, tensor in one.items()])
    assert float((changed > 1e-5).float().mean()) > 0.5, "something was learned"


def test_the_rows_of_a_batch_are_shared_out():
    batch = [torch.arange(8).reshape(4, 2), torch.arange(4)]
    assert [part.tolist() for part in distributed.shard(batch, 1, 2)] == [[[4, 5], [6, 7]], [2, 3]]
    assert distributed.shard(batch, 0, 1)[0].equal(batch[0])
    with pytest.raises(lq.LoopQError, match="4 rows cannot be shared by 3 processes; choose batch_rows"):
        distributed.shard(batch, 0, 3)


def test_in_one_process_nothing_is_averaged():
    tensor = torch.ones(3)
    distributed.average([tensor])
    distributed.barrier()
    assert distributed.world() == (0, 1) and tensor.tolist() == [1.0, 1.0, 1.0]
