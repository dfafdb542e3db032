"""`program.lower("triton")` where there is no GPU."""

import pytest
import torch

import loopq_compile as lq
from loopq_compile.backends.triton import executable
from tests.tiny import tiny_model, tiny_program, tokens


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_the_error_says_what_to_do():
    with pytest.raises(lq.LoopQError, match=r"no NVIDIA GPU.*fallback=True.*TRITON_INTERPRET"):
        tiny_program().lower("triton")


@pytest.mark.usefixtures("no_gpu")
def test_the_fallback_runs_the_definitions_and_leaves_the_program_alone():
    program = tiny_program()
    before = program.graph_module.code
    run = program.lower("triton", fallback=True)
    assert not run.kernels and any(line.parts for line in run.report)
    ids = tokens(4, 3, 7)
    found, expected = run(ids), program(ids)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=float(value.abs().max()) * 0.03)
    assert program.graph_module.code == before
    with pytest.raises(lq.LoopQError):
        run()


def test_an_old_gpu_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(lq.LoopQError, match=r"Tesla T4 has compute capability 7\.5; the kernels need 8\.0"):
        executable.lower(tiny_program())
    with pytest.raises(lq.LoopQError, match="does not run on device 'cpu'"):
        executable.lower(tiny_program(), device="cpu")


def test_a_program_that_no_kernel_fits_is_refused(monkeypatch):
    monkeypatch.setattr(executable, "INTERPRETED", True)
    program = lq.compile(tiny_model(2), tokens(), scheme="w4a16", method="symmetric")
    with pytest.raises(lq.LoopQError, match=r"No kernel fits this program.*floating point"):
        program.lower("triton")
