"""The rewriting passes: what they change, what they do not change, and that a second run changes nothing."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import loopq_compile as lq
from loopq_compile.capture.to_graph import capture
from loopq_compile.graph.loops import get_tag
from loopq_compile.graph.state import copy_graph, get_state, get_tensor
from loopq_compile.operators import ops
from loopq_compile.passes.loops.tag_loops import TagLoops
from loopq_compile.passes.quantize.annotate_linears import AnnotateLinears
from loopq_compile.passes.quantize.collect_ranges import CollectRanges
from loopq_compile.passes.quantize.insert_activation_qdq import InsertActivationQdq
from loopq_compile.passes.quantize.pack_weights import PackWeights
from loopq_compile.passes.quantize.quantize_weights import QuantizeWeights
from loopq_compile.passes.quantize.set_ranges import SetRanges
from loopq_compile.passes.transforms.insert_las import InsertLas
from loopq_compile.pipeline import Pipeline
from tests.tiny import VOCABULARY, tiny_model, tiny_program, tokens


@functools.cache
def captured():
    """The tiny model's graph; shared, so copy it."""
    return capture(tiny_model(), tokens())


def prepared(*passes, scheme="w4a4", model=None, example=None, **fields):
    if model is None and example is None:
        graph_module = copy_graph(captured())
    else:
        graph_module = capture(model or tiny_model(), tokens() if example is None else example)
    state = get_state(graph_module)
    state.scheme = lq.Scheme.parse(scheme, **fields)
    state.run.calibration = [tokens(1), tokens(2)]
    return Pipeline([TagLoops(), AnnotateLinears(), *passes]).run(graph_module)


def nodes(graph_module, operator):
    return [node for node in graph_module.graph.nodes if node.target is operator]


def test_linears_that_read_one_tensor_form_a_group():
    state = get_state(prepared())
    groups = {site.name: site.group for site in state.sites.values() if site.reason is None}
    assert groups["layers.0.attn.q_proj"] == "layers.0.attn.q_proj+k_proj+v_proj" == groups["layers.0.attn.v_proj"]
    assert groups["layers.0.gate"] == "layers.0.gate+up"
    assert len(set(groups.values())) == 4


def test_heads_and_gates_stay_in_floating_point_and_say_why():
    reasons = {site.name: site.reason for site in get_state(prepared()).sites.values() if site.reason}
    assert reasons == {"head": "a language-model head", "exit_gate": "a gate with 1 output"}


def test_patterns_choose_what_is_quantized():
    state = get_state(prepared(skip=("*.down",), quantize=("head",)))
    reasons = {site.name: site.reason for site in state.sites.values()}
    assert reasons["layers.0.down"] == "skip='*.down'"
    assert reasons["head"] is None


def test_each_weight_has_one_pair_that_all_loops_read():
    graph_module = prepared(QuantizeWeights())
    quantized = nodes(graph_module, ops.quantize.default)
    assert len(quantized) == 7
    assert all(get_tag(node) is None for node in quantized)
    readers = [len(user.users) for node in quantized for user in node.users]
    assert readers == [3] * 7, "three loops read each weight"


def test_activations_have_one_pair_per_group_and_loop():
    graph_module = prepared(InsertActivationQdq())
    pairs = nodes(graph_module, ops.quantize.default)
    assert sorted(get_tag(node).index[0] for node in pairs) == sorted([0, 1, 2] * 4)
    tables = [node for node in graph_module.graph.nodes if "loopq_group" in node.meta]
    assert len(tables) == 4
    assert all(get_tensor(graph_module, node.target).shape[0] == 1 for node in tables)


@pytest.mark.parametrize(("granularity", "columns"), [("group", {2, 4}), ("tensor", {1})])
def test_las_gives_every_loop_a_row(granularity, columns):
    graph_module = prepared(InsertActivationQdq(), InsertLas(), activation_granularity=granularity)
    tables = [node for node in graph_module.graph.nodes if "loopq_group" in node.meta]
    shapes = [tuple(get_tensor(graph_module, node.target).shape) for node in tables]
    assert {rows for rows, _ in shapes} == {3} and {width for _, width in shapes} == columns
    for table in tables:
        assert [(get_tag(row).index[0], row.args[2]) for row in table.users] == [(0, 0), (1, 1), (2, 2)]


def test_static_ranges_are_those_of_the_loop():
    graph_module = prepared(
        CollectRanges(),
        InsertActivationQdq(),
        InsertLas(),
        SetRanges(),
        activation="static",
        activation_range="minmax",
    )
    group = "layers.0.gate+up"
    statistics = get_state(graph_module).run.statistics[group]
    table = next(n for n in graph_module.graph.nodes if n.meta.get("loopq_group") == group)
    values = get_tensor(graph_module, table.target)
    for loop in range(3):
        torch.testing.assert_close(values[loop] * 7, statistics[loop].largest)
    assert not torch.equal(values[0], values[2]), "loops differ"


def test_shared_ranges_cover_all_loops():
    graph_module = prepared(
        CollectRanges(), InsertActivationQdq(), SetRanges(), activation="static", activation_range="minmax"
    )
    for node in [n for n in graph_module.graph.nodes if "loopq_group" in n.meta]:
        measured = get_state(graph_module).run.statistics[node.meta["loopq_group"]].values()
        largest = torch.stack([s.largest for s in measured]).amax(0)
        torch.testing.assert_close(get_tensor(graph_module, node.target)[0] * 7, largest)


def test_packing_keeps_the_numbers_and_drops_the_weights():
    before, after = prepared(QuantizeWeights()), prepared(QuantizeWeights(), PackWeights())
    with torch.no_grad():
        assert torch.equal(before(tokens(5))[0], after(tokens(5))[0])
    held = {node.target for node in after.graph.nodes if node.op == "get_attr"}
    assert "layers.0.down.weight" not in held and "layers.0.down.weight_codes" in held
    assert {name for name, _ in [*after.named_parameters(), *after.named_buffers()]} == held
    assert get_tensor(after, "layers.0.down.weight_codes").dtype == torch.int8


@pytest.mark.parametrize("scheme", ["w4a4", "w4a16"])
def test_a_second_run_changes_nothing(scheme):
    again = [QuantizeWeights(), InsertActivationQdq(), InsertLas(), PackWeights(), TagLoops()]
    graph_module = prepared(QuantizeWeights(), InsertActivationQdq(), InsertLas(), PackWeights(), scheme=scheme)
    printed = graph_module.code
    for item in again[2:]:
        assert not item(graph_module).modified, item
    assert graph_module.code == printed


def test_weight_only_schemes_leave_activations_alone():
    graph_module = prepared(QuantizeWeights(), InsertActivationQdq(), InsertLas(), scheme="w4a16")
    assert not nodes(graph_module, ops.dynamic_scale.default)
    assert len(nodes(graph_module, ops.quantize.default)) == 7


@pytest.mark.parametrize("signed", [False, True])
def test_the_definition_of_a_quantized_linear(signed):
    """One linear, computed by hand."""

    def scales(groups):
        peak = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
        return peak / -8 if signed else peak.abs() / 7

    model = nn.Sequential(nn.Linear(32, 16, bias=True)).eval()
    x = torch.randn(4, 5, 32)
    program = lq.compile(
        model, (x,), scheme="w4a4", method="symmetric", weight_range="minmax", group_size=16, signed_scales=signed
    )
    weight = model[0].weight.view(16, 2, 16)
    scale = scales(weight)
    rounded = ((weight / scale).round().clamp(-8, 7) * scale).view(16, 32)
    groups = x.view(4, 5, 2, 16)
    step = scales(groups)
    values = ((groups / step).round().clamp(-8, 7) * step).view(4, 5, 32)
    torch.testing.assert_close(program(x), F.linear(values, rounded, model[0].bias), rtol=1e-5, atol=1e-5)


def test_eight_bits_are_close_and_fewer_bits_are_worse():
    reference = tiny_model()(tokens(7))["logits"]
    errors = {
        name: float((tiny_program(name, "symmetric")(tokens(7))["logits"] - reference).norm() / reference.norm())
        for name in ("w8a8", "w4a8", "w4a4", "w2a2")
    }
    assert errors["w8a8"] < 0.02 < errors["w4a4"] < errors["w2a2"]
    assert errors["w8a8"] < errors["w4a8"] < errors["w4a4"]


def test_a_model_without_loops_is_ordinary_quantization():
    model = nn.Sequential(nn.Embedding(VOCABULARY, 32), nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32)).eval()
    data = [tokens(1)]
    program = lq.compile(model, tokens(), scheme="w8a8", method="las", calibration=data, group_size=16)
    assert program.loops.count == 1 and not program.loops.loops
    assert "No loop was found" in program.summary()
    assert any("no loop found" in note for entry in program.log for note in entry.notes)
    assert (program(tokens(3)) - model(tokens(3))).abs().max() < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("scheme", "activation"), [("w8a8", "static"), ("w8a8", "dynamic"), ("w8a16", "dynamic")])
def test_half_precision_models_stay_in_half_precision(dtype, scheme, activation):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(VOCABULARY, 32), nn.Linear(32, 48), nn.Linear(48, 32)).to(dtype).eval()
    with torch.no_grad():
        model[2].weight[:4] = 0  # groups of zeros: their scale must not vanish
    program = lq.compile(
        model, tokens(), scheme=scheme, method="las", activation=activation, calibration=[tokens(1)], group_size=16
    )
    expected, got = model(tokens(2)), program(tokens(2))
    assert got.dtype == dtype and got.isfinite().all()
    assert (got.float() - expected.float()).norm() < 0.05 * expected.float().norm()


def test_a_weight_that_is_normalised_at_run_time_is_quantized_as_it_results():
    model = nn.Sequential(
        nn.Embedding(VOCABULARY, 32), nn.utils.parametrizations.weight_norm(nn.Linear(32, 32)), nn.Linear(32, 48)
    )
    program = lq.compile(model.eval(), tokens(), scheme="w8a8", method="symmetric")
    assert set(program.graph_module.meta["loopq"].sites) == {"1.weight", "2.weight"}


def test_a_table_of_positions_does_not_make_a_head():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.positions = nn.Embedding(VOCABULARY, 32), nn.Embedding(48, 32)
            self.middle, self.last = nn.Linear(32, 32), nn.Linear(32, 48)

        def forward(self, ids):
            return self.last(self.middle(self.embed(ids) + self.positions(torch.arange(ids.shape[1]))))

    program = lq.compile(Encoder().eval(), tokens(), scheme="w8a8", method="symmetric")
    assert "language-model head" not in program.summary()
