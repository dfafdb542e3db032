"""`latent-weights`: another form of the same program."""

import pytest
import torch

import loopq_compile as lq
from loopq_compile.graph.state import get_tensor
from loopq_compile.operators import ops
from loopq_compile.operators.latent import fraction_of, to_latent
from loopq_compile.passes.quantize.latent_weights import LatentWeights
from loopq_compile.passes.quantize.pack_weights import PackWeights
from loopq_compile.passes.quantize.solve_weights import SolveWeights
from loopq_compile.passes.transforms.widen import widen
from tests.calibration.tools import prepared
from tests.tiny import TinyLoopedLM, tokens


def packed(graph_module):
    """Codes and scales by name."""
    PackWeights()(graph_module)
    tensors = {**dict(graph_module.named_parameters()), **dict(graph_module.named_buffers())}
    return {name: tensor for name, tensor in tensors.items() if name.endswith(("_codes", "_scale"))}


@pytest.mark.parametrize("scheme", ["w2a16", "w4a4", "w8a8"])
def test_the_integers_stay(scheme):
    """Behind a solver, whose weights lie off the borders between integers; also of groups with weights per loop."""
    programs = [prepared(loops=3, scheme=scheme) for _ in range(2)]
    for program in programs:
        widen(program, "layers.0.gate+up")
        SolveWeights("gptq", centered=False)(program)
    before, after = programs
    assert LatentWeights()(after).modified
    left = {str(node.target) for node in after.graph.nodes if node.op == "get_attr"}
    assert "layers.0.gate.weight_loop1_latent" in left and "layers.0.down.weight_latent" in left
    assert not {name for name in left if name.endswith(("_rounding", "weight_clip", "down.weight"))}
    assert not LatentWeights()(after).modified and not SolveWeights("gptq")(after).modified
    after.recompile()
    before.recompile()
    assert after(tokens(5))[0].equal(before(tokens(5))[0])
    expected, found = packed(before), packed(after)
    assert expected.keys() == found.keys() and any(name.endswith("loop2_codes") for name in found)
    for name, tensor in expected.items():
        assert tensor.equal(found[name]), name


@pytest.mark.parametrize("bits", range(2, 9))
def test_latent_numbers_round_as_the_weights_do(bits):
    torch.manual_seed(bits)
    q_min, q_max = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale = torch.randn(6, 4) * 1e-2
    x = torch.randn(6, 64) * 1.5 * q_max * scale.repeat_interleave(16, 1)
    latent = to_latent(x, scale, 16, fraction_of(bits))
    near = ops.from_latent(latent, scale, 16, fraction_of(bits))
    assert ops.quantize(near, scale, 16, q_min, q_max).equal(ops.quantize(x, scale, 16, q_min, q_max))
    inside = latent.int().abs() < 32767
    step = scale.abs().repeat_interleave(16, 1) / 2 ** fraction_of(bits)
    assert inside.float().mean() > 0.5
    assert ((near - x).abs() <= 0.51 * step + 1e-6 * x.abs())[inside].all()


def test_a_released_model_is_empty_at_the_end():
    torch.manual_seed(0)
    model = TinyLoopedLM(2, 1, 32).eval()
    batches = [tokens(seed, 2) for seed in range(4)]
    program = lq.compile(model, tokens(), method="loopq", calibration=batches, steps=2, release_model=True)
    assert model.layers[0].down.weight.untyped_storage().nbytes() == 0
    assert model.embed.weight.untyped_storage().nbytes() > 0
    assert get_tensor(program.graph_module, "layers.0.down.weight_codes").shape == model.layers[0].down.weight.shape
