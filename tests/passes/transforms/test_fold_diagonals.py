"""`fold-diagonals`: exact if the gain before it belongs to one group; otherwise it gives a reason."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from loopq_compile.graph.loops import get_tag
from loopq_compile.graph.state import get_state, get_tensor
from loopq_compile.passes.quantize.pack_weights import PackWeights
from loopq_compile.passes.quantize.quantize_weights import QuantizeWeights
from loopq_compile.passes.transforms.fold_diagonals import FoldDiagonals
from loopq_compile.passes.transforms.insert_transforms import InsertTransforms
from loopq_compile.passes.transforms.smooth_activations import SmoothActivations
from loopq_compile.passes.transforms.tables import group_tables
from tests import zoo_models
from tests.passes.test_rewriting import nodes, prepared
from tests.passes.transforms.test_insert_transforms import assert_same_function, read
from tests.tiny import TinyLoopedLM, tokens

_mul = torch.ops.aten.mul.Tensor


def online(graph_module):
    """Groups whose diagonal is multiplied with activations while the program runs."""
    products = [node for node in nodes(graph_module, _mul) if get_tag(node)]
    return {node.meta["loopq_site"] for node in products if "loopq_site" in node.meta}


def with_gains(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.rand(parameter.shape, generator=generator))
    return model


def tiny():
    torch.manual_seed(0)
    return with_gains(TinyLoopedLM().eval())


def notes(graph_module, name="fold-diagonals"):
    return [note for entry in get_state(graph_module).log if entry.pass_name == name for note in entry.notes]


def test_diagonals_behind_norms_are_folded_and_others_are_not():
    model = tiny()
    smooth, folded = (
        prepared(SmoothActivations(), model=model),
        prepared(SmoothActivations(), FoldDiagonals(), model=model),
    )
    assert online(smooth) == set(group_tables(smooth))
    assert online(folded) == {"layers.0.attn.o_proj", "layers.0.down"}
    assert_same_function(folded, model)
    gain = get_tensor(folded, "layers.0.norm1.weight")
    diagonal = group_tables(folded)["layers.0.attn.q_proj+k_proj+v_proj"]["diagonal"]
    expected = model.layers[0].norm1.weight * get_tensor(folded, diagonal.target)[0]
    torch.testing.assert_close(gain, expected.detach())
    before, after = (read(item, tokens(3))["layers.0.attn.v_proj"] for item in (smooth, folded))
    torch.testing.assert_close(before, after)
    assert notes(folded)[0].startswith("2 diagonals") and "is not a norm with a gain" in notes(folded)[1]


def test_a_folded_diagonal_is_not_learned_any_more():
    graph_module = prepared(SmoothActivations(learn=True), FoldDiagonals())
    learned = {node.meta["loopq_transform"] for node in graph_module.graph.nodes if "loopq_learn" in node.meta}
    assert learned == {"layers.0.attn.o_proj", "layers.0.down"}


def test_gains_move_into_weights_in_front_of_a_rotation():
    """What QuaRot does first: afterwards gains are one and the rotation gets the normed state itself."""
    model = tiny()
    graph_module = prepared(InsertTransforms("hadamard", diagonal="gain"), FoldDiagonals(), model=model)
    for name in ("norm1", "norm2"):
        gain = get_tensor(graph_module, f"layers.0.{name}.weight")
        torch.testing.assert_close(gain, torch.ones(64), rtol=1e-6, atol=1e-6)
    assert not online(graph_module)
    assert_same_function(graph_module, model)
    state = model.embed(tokens(3))
    normed = F.rms_norm(state, (64,))
    first = read(graph_module, tokens(3))["layers.0.attn.v_proj"][0]
    torch.testing.assert_close(first.norm(dim=-1), normed.norm(dim=-1))


def test_zero_gains_are_no_trouble():
    model = tiny()
    with torch.no_grad():
        model.layers[0].norm1.weight[4:9] = 0
    graph_module = prepared(InsertTransforms("hadamard", diagonal="gain"), FoldDiagonals(), model=model)
    assert_same_function(graph_module, model)


def test_layer_norms_with_bias():
    class Model(zoo_models.Looped):
        def __init__(self):
            super().__init__()
            self.block = zoo_models.Attention()

        def run(self, x):
            for _ in range(3):
                x = self.block(x)
            return x

    torch.manual_seed(0)
    model = with_gains(Model().eval())
    graph_module = prepared(SmoothActivations(), FoldDiagonals(), model=model)
    assert online(graph_module) == {"block.out"}
    assert_same_function(graph_module, model)


class Written(nn.Module):
    """A norm that ends in `weight * x`, as many models write it, read by one linear or by other things too."""

    def __init__(self, other=None):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.other = nn.Embedding(64, 32), other
        self.gain = nn.Parameter(torch.rand(32) + 0.5)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.lm_head = nn.Linear(32, 64, bias=False)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for _ in range(3):
            y = self.gain * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))
            if self.other == "bias":
                y = F.layer_norm(x, (32,), self.gain, 2 * self.down.bias)
            x = x + self.down(F.silu(self.up(y))) + (y if self.other == "state" else 0)
        if self.other == "gain":
            x = x * self.gain
        return self.lm_head(x)


@pytest.mark.parametrize(
    ("other", "reason"),
    [(None, None), ("state", "also reads mul"), ("gain", "also uses gain"), ("bias", "is not a norm with a gain")],
    ids=str,
)
def test_gains_that_others_read_stay(other, reason):
    model = Written(other).eval()
    graph_module = prepared(SmoothActivations(), FoldDiagonals(), model=model)
    assert_same_function(graph_module, model)
    assert ("up" in online(graph_module)) == (other is not None)
    assert reason is None or any(reason in note for note in notes(graph_module))


def test_a_diagonal_per_loop_stays():
    graph_module = prepared(InsertTransforms(matrix=None, diagonal=True, per_loop=None), FoldDiagonals())
    assert len(online(graph_module)) == 4
    assert any("differs between loops" in note for note in notes(graph_module))


def test_a_second_run_changes_nothing_and_packing_drops_the_diagonal():
    model = tiny()
    graph_module = prepared(SmoothActivations(), FoldDiagonals(), QuantizeWeights(), model=model)
    printed = graph_module.code
    assert not FoldDiagonals()(graph_module).modified
    graph_module.recompile()
    assert graph_module.code == printed
    with torch.no_grad():
        expected = graph_module(tokens(4))
        PackWeights()(graph_module)
        graph_module.recompile()
        torch.testing.assert_close(graph_module(tokens(4)), expected, rtol=0, atol=0)
    assert set(group_tables(graph_module)) == {"layers.0.attn.o_proj", "layers.0.down"}
    assert len(nodes(graph_module, _mul)) == 2 * 3 + 3, "two diagonals and the gated product, in three loops"


def test_half_precision():
    torch.manual_seed(0)
    model = with_gains(TinyLoopedLM().to(torch.bfloat16).eval())
    graph_module = prepared(SmoothActivations(), FoldDiagonals(), model=model)
    assert online(graph_module) == {"layers.0.attn.o_proj", "layers.0.down"}
    assert_same_function(graph_module, model, tolerance=0.1)
