"""`program.lower("triton")` without a GPU."""

import pytest
import torch

import loopq_compile as lq
from loopq_compile.backends.triton import executable
from loopq_compile.graph.rolled import rolled_loops
from loopq_compile.operators import ops
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


@pytest.mark.parametrize("method", ["las", "loopq"])
def test_a_rolled_graph_computes_the_same_and_does_not_grow(method):
    """Bit-identical, with tables, weights per loop and adapters."""
    options = {"steps": 2} if method == "loopq" else {}
    data = [tokens(seed) for seed in range(3)]
    program = lq.compile(tiny_model(3), tokens(), scheme="w4a4", method=method, calibration=data, **options)
    unrolled, rolled = (program.lower("triton", fallback=True, rolled=flag) for flag in (False, True))
    (loop,) = rolled_loops(rolled.graph_module)
    body = [node.target for node in loop.body.graph.nodes]
    assert body.count(ops.quantize_packed.default) == body.count(ops.packed_linear.default) == 4
    for seed, batch, length in ((5, 2, 9), (6, 1, 1)):
        found, expected = rolled(tokens(seed, batch, length)), unrolled(tokens(seed, batch, length))
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_kernels_are_put_into_the_body_too():
    graph_module = executable.use_kernels(executable.fuse(tiny_program(), rolled=True))
    (loop,) = rolled_loops(graph_module)
    targets = {str(node.target) for node in loop.body.graph.nodes}
    assert {"loopq_triton.quantize_packed.default", "loopq_triton.packed_linear.default"} <= targets
    assert not any(name.startswith(("loopq.quantize_packed", "loopq.packed")) for name in targets)
