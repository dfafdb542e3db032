"""`insert-transforms`: the function stays the same; the input of quantizers changes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import loopq_compile as lq
from loopq_compile.capture.to_graph import capture
from loopq_compile.errors import InternalError
from loopq_compile.graph.loops import get_tag
from loopq_compile.graph.state import get_state, get_tensor, set_tensor
from loopq_compile.operators import ops
from loopq_compile.passes.quantize.insert_activation_qdq import InsertActivationQdq
from loopq_compile.passes.quantize.pack_weights import PackWeights
from loopq_compile.passes.quantize.quantize_weights import QuantizeWeights
from loopq_compile.passes.transforms.insert_transforms import InsertTransforms, condition_numbers
from loopq_compile.passes.transforms.tables import group_tables
from tests import zoo_models
from tests.passes.test_rewriting import nodes, prepared
from tests.tiny import TinyLoopedLM, tiny_model, tokens

VARIANTS = {
    "kronecker": {"init": "orthogonal"},
    "kronecker-hadamard": {"init": "hadamard", "learn": "transform"},
    "identity": {},
    "diagonal": {"matrix": None, "diagonal": True},
    "gain": {"matrix": "hadamard", "diagonal": "gain"},
    "both": {"init": "orthogonal", "diagonal": True, "learn": "transform"},
    "hadamard": {"matrix": "hadamard"},
    "full": {"matrix": "full", "init": "orthogonal", "learn": "orthogonal"},
    "full-hadamard-shared": {"matrix": "full", "init": "hadamard", "shared": True},
    "per-loop": {"init": "orthogonal", "diagonal": True, "per_loop": None},
}


def scattered(graph_module, seed=0, amount=1.0):
    """Every diagonal and every learnable factor away from its start, each row differently."""
    generator = torch.Generator().manual_seed(seed)
    for parts in group_tables(graph_module).values():
        for part, node in parts.items():
            old = get_tensor(graph_module, node.target)
            if part == "diagonal":
                new = old * torch.exp(amount * torch.randn(old.shape, generator=generator)).to(old.dtype)
            elif "loopq_learn" in node.meta or len(old) > 1:
                new = old + 0.1 * amount * torch.randn(old.shape, generator=generator).to(old.dtype)
            else:
                new = old
            set_tensor(graph_module, node.target, new)
    graph_module.recompile()
    return graph_module


def assert_same_function(graph_module, model, example=None, tolerance=2e-5):
    x = tokens(9) if example is None else example
    with torch.no_grad():
        expected, got = torch.utils._pytree.tree_leaves(model(x)), graph_module(x)
    for a, b in zip(expected, got, strict=True):
        assert b.isfinite().all() and a.dtype == b.dtype
        assert (a - b).abs().max() <= tolerance * a.abs().max()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_function_stays_the_same(variant):
    graph_module = scattered(prepared(InsertTransforms(**VARIANTS[variant])))
    assert_same_function(graph_module, tiny_model())


def looped(block, counts=(3,)):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.block, self.lm_head = nn.Embedding(64, 32), block(), nn.Linear(32, 64, bias=False)
            self.inner, self.nested = zoo_models.Mlp(bias=True), len(counts) > 1

        def forward(self, input_ids):
            x = self.embed(input_ids)
            for _ in range(counts[0]):
                x = self.block(x)
                for _ in range(counts[-1] if self.nested else 0):
                    x = self.inner(x)
            return self.lm_head(x)

    return Model().eval()


@pytest.mark.parametrize("variant", ["both", "hadamard", "per-loop"])
@pytest.mark.parametrize("counts", [(3,), (3, 2)], ids=["fused", "nested"])
def test_biases_layer_norms_and_nested_loops(variant, counts):
    model = looped(zoo_models.Attention, counts)
    graph_module = scattered(prepared(InsertTransforms(**VARIANTS[variant]), model=model))
    assert_same_function(graph_module, model)
    if variant == "per-loop":
        rows = {len(get_tensor(graph_module, parts["left"].target)) for parts in group_tables(graph_module).values()}
        assert rows == {3, *([6] if len(counts) > 1 else [])}


def test_tied_weights_stay_tied():
    model = zoo_models.Tied().eval()
    graph_module = scattered(prepared(InsertTransforms(init="orthogonal"), model=model))
    assert_same_function(graph_module, model)
    assert all("embed" not in site.group for site in get_state(graph_module).sites.values() if not site.reason)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("variant", ["both", "hadamard"])
def test_other_precisions(dtype, variant):
    torch.manual_seed(0)
    model = TinyLoopedLM().to(dtype).eval()
    graph_module = scattered(prepared(InsertTransforms(**VARIANTS[variant]), model=model))
    tolerance = {torch.bfloat16: 0.1, torch.float16: 0.02, torch.float64: 1e-12}[dtype]
    assert_same_function(graph_module, model, tolerance=tolerance)


def test_each_use_reads_its_row_and_each_weight_one_chain_per_row():
    plain = prepared(InsertTransforms(init="orthogonal"))
    wide = prepared(InsertTransforms(init="orthogonal", per_loop="*.down"))
    for graph_module, chains in ((plain, 7), (wide, 7 + 2)):
        found = nodes(graph_module, ops.kronecker.default)
        activations = [node for node in found if get_tag(node)]
        assert len(activations) == 4 * 3 and len(found) - len(activations) == chains
    down = [node for node in nodes(wide, ops.kronecker.default) if get_tag(node) and "down" in node.meta["loopq_site"]]
    assert [(get_tag(node).index[0], node.args[1].args[2]) for node in down] == [(0, 0), (1, 1), (2, 2)]


def test_tables_say_what_they_are_and_what_may_be_learned():
    learned = group_tables(prepared(InsertTransforms(diagonal=True, learn="transform")))
    assert set(learned) == {
        "layers.0.attn.q_proj+k_proj+v_proj",
        "layers.0.attn.o_proj",
        "layers.0.gate+up",
        "layers.0.down",
    }
    for parts in learned.values():
        assert {part: node.meta["loopq_learn"] for part, node in parts.items()} == {
            "diagonal": "diagonal",
            "left": "transform",
            "right": "transform",
        }
    fixed = group_tables(prepared(InsertTransforms("hadamard", diagonal="gain", learn="transform")))
    assert not any("loopq_learn" in parts["left"].meta for parts in fixed.values())


def test_shared_rotations_have_one_table_for_each_width():
    graph_module = prepared(InsertTransforms("full", init="orthogonal", learn="orthogonal", shared=True))
    tables = group_tables(graph_module)
    assert {name: tuple(get_tensor(graph_module, parts["left"].target).shape) for name, parts in tables.items()} == {
        "width_64": (1, 64, 64),
        "width_128": (1, 128, 128),
    }
    assert {parts["left"].meta["loopq_learn"] for parts in tables.values()} == {"orthogonal"}
    assert not any("loopq_learn" in parts["right"].meta for parts in tables.values())


def test_patterns_choose_groups_and_the_rest_is_left_alone():
    graph_module = prepared(InsertTransforms(groups="*.down", diagonal=True))
    assert set(group_tables(graph_module)) == {"layers.0.down"}
    assert {n.meta["loopq_site"] for n in nodes(graph_module, ops.kronecker.default)} == {"layers.0.down"}
    with pytest.raises(lq.LoopQError, match=r"no group is called 'layers\.0\.dwn'"):
        prepared(InsertTransforms(groups="layers.0.dwn"))
    with pytest.raises(lq.LoopQError, match="matrix='kron'"):
        InsertTransforms("kron")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_second_run_changes_nothing(variant):
    item = InsertTransforms(**VARIANTS[variant])
    graph_module = prepared(item)
    printed = graph_module.code
    assert not item(graph_module).modified
    for later in (QuantizeWeights(), InsertActivationQdq(), PackWeights()):
        later(graph_module)
        assert not item(graph_module).modified
    graph_module = prepared(item)
    assert graph_module.code == printed


def test_weights_that_are_quantized_come_too_late():
    with pytest.raises(InternalError, match="must come before quantize-weights"):
        prepared(QuantizeWeights(), InsertTransforms())


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    ("part", "value", "message"),
    [("left", 0.0, "cannot be inverted"), ("right", float("nan"), "NaN"), ("diagonal", 0.0, "cannot be inverted")],
)
def test_singular_transforms_are_errors_that_name_group_and_loop(rows, part, value, message):
    graph_module = prepared(InsertTransforms(diagonal=True, per_loop=None if rows == 3 else ()))
    table = group_tables(graph_module)["layers.0.down"][part]
    values = get_tensor(graph_module, table.target).clone()
    values[-1, 0] = value
    set_tensor(graph_module, table.target, values)
    with pytest.raises(lq.LoopQError, match=message) as caught:
        condition_numbers(graph_module)
    assert "layers.0.down" in str(caught.value)
    assert ("loop 2" in str(caught.value)) == (rows == 3)


def test_condition_numbers_are_products_of_those_of_the_parts():
    graph_module = prepared(InsertTransforms(diagonal=True, groups="*.down"))
    parts = group_tables(graph_module)["layers.0.down"]
    set_tensor(graph_module, parts["diagonal"].target, torch.linspace(1, 4, 128)[None])
    left = torch.eye(8)
    left[0, 0] = 5
    set_tensor(graph_module, parts["left"].target, left[None])
    assert condition_numbers(graph_module) == {"layers.0.down": pytest.approx(20.0)}


def test_the_definition_of_a_transformed_quantized_linear():
    """One linear, computed by hand: `Q(x P) Q(W P^-T)^T`."""
    model = nn.Sequential(nn.Linear(32, 16)).eval()
    x = torch.randn(4, 5, 32, generator=torch.Generator().manual_seed(0))
    graph_module = prepared(
        InsertTransforms(init="orthogonal"), model=model, example=(x,), weight_range="minmax", signed_scales=False
    )
    scattered(graph_module)
    QuantizeWeights()(graph_module)
    PackWeights()(graph_module)
    graph_module.recompile()
    (parts,) = group_tables(graph_module).values()
    left, right = (get_tensor(graph_module, parts[part].target)[0] for part in ("left", "right"))
    transform = torch.kron(left, right)
    weight = model[0].weight @ torch.linalg.inv(transform).t()
    scale = weight.abs().amax(-1, keepdim=True) / 7
    rounded = (weight / scale).round().clamp(-8, 7) * scale
    with torch.no_grad():
        torch.testing.assert_close(graph_module(x)[0], F.linear(x @ transform, rounded, model[0].bias))


def outlier_model():
    """Channels 3 and 40 of everything that is added to the state are large."""
    torch.manual_seed(0)
    model = TinyLoopedLM(loops=2).eval()
    with torch.no_grad():
        model.embed.weight[:, [3, 40]] *= 30
        model.layers[0].norm1.weight[:] = torch.rand(64) + 0.5
    return model


def read(graph_module, ids):
    """What each use of a group reads: `[group, values]`."""
    watched = {}
    for node in graph_module.graph.nodes:
        if node.target is torch.ops.aten.linear.default and "loopq_site" in node.meta:
            watched[node.args[0].name] = node.meta["loopq_site"]
    seen = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n):
            value = super().run_node(n)
            if n.name in watched:
                seen.setdefault(watched[n.name], []).append(value)
            return value

    with torch.no_grad():
        Watch(graph_module).run(ids)
    return seen


def test_rotations_take_outliers_away():
    model = outlier_model()
    plain, rotated = (
        prepared(*passes, model=model) for passes in ([], [InsertTransforms("hadamard"), InsertTransforms("hadamard")])
    )
    before, after = read(plain, tokens(3))["layers.0.attn.v_proj"], read(rotated, tokens(3))["layers.0.attn.v_proj"]
    for x, y in zip(before, after, strict=True):
        torch.testing.assert_close(x.norm(dim=-1), y.norm(dim=-1)), "a rotation keeps lengths"
        assert y.abs().amax(-1).mean() < 0.7 * x.abs().amax(-1).mean()
        assert kurtosis(y) < 0.5 * kurtosis(x)


def kurtosis(x):
    x = x.flatten()
    return float((x**4).mean() / (x**2).mean() ** 2)


def test_captured_models_are_not_touched():
    model = TinyLoopedLM().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    graph_module = capture(model, tokens())
    get_state(graph_module).scheme = lq.Scheme()
    prepared(InsertTransforms("hadamard", diagonal="gain"), QuantizeWeights(), PackWeights(), model=model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
