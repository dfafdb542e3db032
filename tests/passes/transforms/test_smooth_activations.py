"""`smooth-activations`: SmoothQuant's formula, dead channels, and that the function stays the same."""

import pytest
import torch
from torch import nn

import loopq_compile as lq
from loopq_compile.graph.loops import get_tag
from loopq_compile.graph.state import get_tensor
from loopq_compile.passes.transforms.fold_diagonals import FoldDiagonals
from loopq_compile.passes.transforms.smooth_activations import SmoothActivations, smoothing_scale
from loopq_compile.passes.transforms.tables import group_tables
from tests.passes.test_rewriting import nodes, prepared
from tests.passes.transforms.test_insert_transforms import assert_same_function, outlier_model, read
from tests.tiny import tiny_model, tokens

_mul = torch.ops.aten.mul.Tensor


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_factors_follow_the_formula_over_loops_tokens_and_members(alpha):
    model = outlier_model()
    plain = prepared(model=model)
    reads = [read(plain, tokens(seed))["layers.0.attn.v_proj"] for seed in (1, 2)]  # the two calibration batches
    activation = torch.stack([x.abs().amax((0, 1)) for batch in reads for x in batch]).amax(0)
    attn = model.layers[0].attn
    weight = torch.cat([attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight]).abs().amax(0)
    expected = activation**alpha / weight ** (1 - alpha)
    graph_module = prepared(SmoothActivations(alpha), model=model)
    diagonal = group_tables(graph_module)["layers.0.attn.q_proj+k_proj+v_proj"]["diagonal"]
    torch.testing.assert_close(get_tensor(graph_module, diagonal.target)[0], (1 / expected).detach())


def test_the_function_stays_and_every_use_is_smoothed():
    graph_module = prepared(SmoothActivations())
    assert_same_function(graph_module, tiny_model())
    smoothed = [node for node in nodes(graph_module, _mul) if "loopq_site" in node.meta and get_tag(node)]
    assert len(smoothed) == 4 * 3, "four groups, three loops"
    assert all(not {"loopq_learn"} & node.meta.keys() for node in graph_module.graph.nodes)


def test_outlier_channels_shrink():
    model = outlier_model()
    with torch.no_grad():
        model.layers[0].norm1.weight[7] = 40.0
    before = read(prepared(model=model), tokens(3))["layers.0.attn.v_proj"]
    after = read(prepared(SmoothActivations(), model=model), tokens(3))["layers.0.attn.v_proj"]

    def spread(values):
        largest = torch.cat(values).abs().amax((0, 1))
        return float(largest.max() / largest.median())

    assert spread(after) < 0.3 * spread(before)


def test_dead_channels_are_left_alone():
    scale = smoothing_scale(torch.tensor([0.0, 2.0, 1e-30, 4.0]), torch.tensor([1.0, 0.0, 1e30, 1.0]), 0.5)
    assert scale.tolist() == [1.0, 1.0, 1e-5, 2.0]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(64, 32), nn.ReLU(), nn.Linear(32, 48)).eval()
    with torch.no_grad():
        model[0].weight[:, 3] = -1  # never comes through the ReLU
        model[2].weight[:, 5] = 0
    graph_module = prepared(SmoothActivations(), model=model)
    assert_same_function(graph_module, model)
    ((table,),) = (parts.values() for parts in group_tables(graph_module).values())
    assert get_tensor(graph_module, table.target)[0, [3, 5]].tolist() == [1.0, 1.0]


def test_a_second_run_changes_nothing():
    item = SmoothActivations()
    graph_module = prepared(item)
    printed = graph_module.code
    assert not item(graph_module).modified
    graph_module.recompile()
    assert graph_module.code == printed


def test_weight_only_schemes_are_left_alone():
    assert not group_tables(prepared(SmoothActivations(), scheme="w4a16"))


@pytest.mark.parametrize("alpha", [-0.1, 1.5, True, "half"])
def test_alpha_must_be_a_share(alpha):
    with pytest.raises(lq.LoopQError, match="must lie between 0 and 1"):
        SmoothActivations(alpha)


def test_smoothing_without_data_says_what_is_missing():
    pipeline = lq.pipelines.symmetric().insert_after("annotate-linears", SmoothActivations())
    with pytest.raises(lq.LoopQError, match="needs calibration data"):
        lq.compile(tiny_model(), tokens(), method=lq.Pipeline(pipeline), calibration=None)


def test_foldable_diagonals_leave_nothing_in_the_program():
    graph_module = prepared(SmoothActivations(foldable=True), FoldDiagonals())
    assert_same_function(graph_module, tiny_model())
    tables = [node for node in graph_module.graph.nodes if node.meta.get("loopq_transform")]
    activations = [user for node in tables for row in node.users for user in row.users if user.target is _mul]
    assert not activations
    groups = set(group_tables(prepared(SmoothActivations(foldable=True))))
    assert groups and groups < set(group_tables(prepared(SmoothActivations())))
