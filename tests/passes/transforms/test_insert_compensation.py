"""`insert-compensation`: the best low-rank part, one row of coefficients a loop, and how far it travels."""

import pytest
import torch

import loopq_compile as lq
from loopq_compile.backends.onnx import OnnxExecutable, export
from loopq_compile.backends.plain import plain_linears
from loopq_compile.graph.loops import get_tag
from loopq_compile.graph.state import get_state, get_tensor
from loopq_compile.methods import loopq
from loopq_compile.operators import ops
from loopq_compile.passes.learn.calibrate import Calibrate
from loopq_compile.passes.quantize.pack_weights import PackWeights
from loopq_compile.passes.transforms.insert_compensation import InsertCompensation, low_rank, unrounded
from tests.backends.onnx.test_rolled import difference
from tests.calibration.tools import prepared
from tests.tiny import tiny_model, tokens


def weighted(error, moments):
    return float((error.double() * moments.double().sqrt()).square().sum())


def test_the_low_rank_part_is_the_best_for_these_inputs():
    generator = torch.Generator().manual_seed(0)
    error = torch.randn(24, 32, generator=generator)
    moments = torch.rand(32, generator=generator).square() * 9 + 0.01
    down, up = low_rank(error, moments, 4)
    assert down.shape == (32, 4) and up.shape == (24, 4)
    left = weighted(error - up @ down.t(), moments)
    values = torch.linalg.svdvals(error.double() * moments.double().sqrt())
    assert left == pytest.approx(float(values[4:].square().sum()), rel=1e-4), "Eckart and Young"
    plain = low_rank(error, torch.ones(32), 4)
    assert left < 0.95 * weighted(error - plain[1] @ plain[0].t(), moments)


def test_full_rank_removes_all_of_the_error_even_for_silent_channels():
    error, moments = torch.randn(8, 6, generator=torch.Generator().manual_seed(1)), torch.tensor([1.0, 0, 2, 0, 3, 4])
    down, up = low_rank(error, moments, 99)
    torch.testing.assert_close((up @ down.t()).float(), error, atol=1e-4, rtol=1e-4)


def test_every_loop_reads_its_row_and_shares_the_rest():
    graph_module = prepared(InsertCompensation(4), loops=3)
    made = [node for node in graph_module.graph.nodes if node.target is ops.compensate.default]
    assert len(made) == 3 * 7
    for node in made:
        linear, x, row = node.args[:3]
        assert get_tag(node) == get_tag(linear) and x is unrounded(linear)
        assert x.target is not ops.dequantize.default and row.args[1:] == (0, get_tag(node).index[0])
        assert list(linear.users) == [node], "nothing reads the output without compensation"
        assert get_tensor(graph_module, str(row.args[0].target)).shape == (3, 4)
    assert len({node.args[3] for node in made}) == 7
    again = InsertCompensation(4)(graph_module)
    assert not again.modified
    assert not InsertCompensation(0)(prepared()).modified
    with pytest.raises(lq.LoopQError, match="before latent-weights"):
        prepared(InsertCompensation(4), rounding=True)
    with pytest.raises(lq.LoopQError, match="rank=-1"):
        InsertCompensation(-1)


def outputs_error(graph_module):
    teacher, x = get_state(graph_module).run.teacher, tokens(9, 4)
    with torch.no_grad():
        return float((graph_module(x)[0] - teacher(x)[0]).square().mean())


def test_full_rank_gives_back_what_rounding_of_weights_took():
    before = outputs_error(prepared(scheme="w3a16"))
    some = outputs_error(prepared(InsertCompensation(8), scheme="w3a16"))
    full = outputs_error(prepared(InsertCompensation(64), scheme="w3a16"))
    assert full < 1e-8 < some < before


@pytest.fixture(scope="module")
def compiled():
    data = [tokens(seed) for seed in range(4)]
    pipeline = loopq(compensation_rank=4)
    return lq.compile(tiny_model(3), tokens(), scheme="w4a8", method=pipeline, calibration=data, steps=4, group_size=16)


def test_it_is_learned_saved_and_counted(compiled, tmp_path):
    graph_module = compiled.graph_module
    stored = sum(t.numel() for name, t in graph_module.state_dict().items() if name.startswith("compensation."))
    phases = get_state(graph_module).results["calibration"]
    assert stored and phases[-1]["learned"]["adapter"] == stored + phases[0]["learned"]["adapter"]
    assert f"compensation {stored:,} " in compiled.summary()
    compiled.save(tmp_path / "p")
    with torch.no_grad():
        assert torch.equal(lq.load(tmp_path / "p")(tokens(5))["logits"], compiled(tokens(5))["logits"])


def test_every_part_has_a_gradient():
    with Calibrate(kinds=("adapter",)).prepared(prepared(InsertCompensation(4))) as training:
        training.backward(0)
        found = {item.name: item.gradient for item in training.learnables if item.name.startswith("compensation.")}
    assert len(found) == 3 * 7 and all(float(gradient.abs().sum()) > 0 for gradient in found.values())


@pytest.mark.parametrize(
    ("target", "form"), [("qdq", "unrolled"), ("onnxruntime", "unrolled"), ("onnxruntime", "rolled")]
)
def test_files_run_it(compiled, tmp_path, target, form):
    run = OnnxExecutable(export(compiled.graph_module, tmp_path, target=target, form=form).path, threads=1)
    # On a single text a last bit may decide a code; a wrong number shows in all of them.
    most = 1e-4 if target == "qdq" else 1e-2  # ONNX Runtime rounds activations once more
    assert min(difference(compiled(x), run(x)) for x in (tokens(5), tokens(6), tokens(7))) < most


def test_engines_without_it_refuse():
    program = prepared(InsertCompensation(4), transforms=False, adapters=False, scheme="w4a16")
    PackWeights()(program)
    with pytest.raises(lq.LoopQError, match="a low-rank compensation of rounding"):
        plain_linears(program, "llama.cpp", "GGUF")
    with pytest.raises(lq.LoopQError, match="compensation_rank needs rounding=True"):
        loopq(rounding=False, compensation_rank=4)
