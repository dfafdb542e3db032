"""`fuse-linears` and `fuse-adapters`: what they change, what they do not change, and what they report."""

import copy
import functools

import pytest
import torch

import loopq_compile as lq
from loopq_compile.graph.loops import get_tag
from loopq_compile.graph.state import get_state, get_tensor
from loopq_compile.operators import ops
from loopq_compile.operators.packed import pack_codes, unpack_codes
from loopq_compile.passes.fuse.fuse_adapters import FuseAdapters
from loopq_compile.passes.fuse.fuse_linears import FuseLinears
from loopq_compile.passes.fuse.fusion import RESULTS, Limits
from loopq_compile.pipeline import Pipeline
from tests.tiny import tiny_model, tokens

_aten = torch.ops.aten


def program(method="las", scheme="w4a4", **options):
    """A separate program for every caller, who may change it."""
    return lq.Program(copy.deepcopy(compiled(method, scheme, **options).graph_module))


@functools.cache
def compiled(method, scheme, **options):
    options |= {"steps": 3} if method == "loopq" else {}
    data = [tokens(seed) for seed in range(3)]
    return lq.compile(tiny_model(3), tokens(), method=method, scheme=scheme, calibration=data, **options)


def fused(source, limits=None):
    return Pipeline([FuseLinears(limits), FuseAdapters()]).run(source.graph_module)


def nodes(graph_module, operator):
    return [node for node in graph_module.graph.nodes if node.target is operator]


def report(graph_module):
    return get_state(graph_module).results[RESULTS]


@pytest.mark.parametrize(
    ("method", "options"),
    [("las", {}), ("las", {"activation": "static"}), ("loopq", {}), ("symmetric", {"scheme": "w8a8"}), ("quarot", {})],
)
def test_the_fused_graph_computes_the_same(method, options):
    source = program(method, **options)
    expected = [source(tokens(seed, 2, 9)) for seed in (5, 6)]
    graph_module = fused(source)
    assert not nodes(graph_module, ops.quantize.default) and not nodes(graph_module, ops.dequantize.default)
    assert {node.meta["loopq_site"] for node in nodes(graph_module, _aten.linear.default)} == {"head", "exit_gate"}
    for seed, right in zip((5, 6), expected, strict=True):
        found = source(tokens(seed, 2, 9))
        for key, value in right.items():
            difference = (found[key] - value).abs() / value.abs().max()
            assert difference.max() < 0.03 and difference.mean() < 0.003


def test_one_launch_for_each_group_and_loop():
    graph_module = fused(program())
    launches = nodes(graph_module, ops.packed_linear.default)
    assert len(launches) == len(nodes(graph_module, ops.quantize_packed.default)) == 3 * 4
    assert sorted(get_tag(node).index[0] for node in launches) == sorted([0, 1, 2] * 4)
    assert [node.args[11] for node in nodes(graph_module, ops.quantize_packed.default)] == [0] * 4 + [1] * 4 + [2] * 4
    weights = {node.args[2] for node in launches}
    assert len(weights) == 4, "loops share their weights"
    assert {tuple(get_tensor(graph_module, node.target).shape) for node in weights} == {
        (1, 2, 128, 16),
        (1, 2, 64, 16),
        (1, 2, 256, 16),
        (1, 4, 64, 16),
    }


def test_weights_per_loop_are_rows_of_one_tensor_and_adapters_are_fused():
    graph_module = fused(program("loopq"))
    rows = {
        get_tensor(graph_module, node.args[2].target).shape[0]: node.args[5]
        for node in nodes(graph_module, ops.packed_linear.default)
    }
    assert set(rows) == {1, 3} and rows == {1: 0, 3: 2}
    assert [node.args[7] for node in nodes(graph_module, ops.transition_adapter_row.default)] == [0, 1]
    assert not nodes(graph_module, ops.transition_adapter.default)


def test_the_report_says_what_was_fused_and_why_the_rest_was_not():
    lines = report(fused(program("loopq")))
    parts = {line["site"]: line["parts"] for line in lines if line["parts"]}
    assert tuple(parts["layers.0.down"]) == ("swiglu", "diagonal", "kronecker", "dynamic quantize", "1 linear")
    assert next(iter(parts["layers.0.gate+up"])) == "rms_norm"
    refused = {(line["site"], line["loop"]): line["reason"] for line in lines if not line["parts"]}
    assert refused["head", ""] == refused["exit_gate", "1"] == "its input or weight stays in floating point"


def test_a_weight_is_left_alone_where_one_use_is_not_covered():
    source = program()
    graph_module = source.graph_module
    linear = next(n for n in nodes(graph_module, _aten.linear.default) if n.meta["loopq_site"] == "layers.0.down")
    with graph_module.graph.inserting_after(linear):  # the weight of one loop's `down` gets another reader
        extra = graph_module.graph.call_function(_aten.neg.default, (linear.args[1],))
    output = next(node for node in graph_module.graph.nodes if node.op == "output")
    output.args = ((*output.args[0], extra),)
    fused(source)
    left = [n for n in nodes(graph_module, _aten.linear.default) if n.meta["loopq_site"] == "layers.0.down"]
    assert len(left) == 3, "all three loops keep the linear"
    reasons = [line["reason"] for line in report(graph_module) if line["site"] == "layers.0.down"]
    assert len(reasons) == 3 and all("also used by neg" in reason for reason in reasons)
    assert len(nodes(graph_module, ops.packed_linear.default)) == 3 * 3


def test_a_transform_that_does_not_fit_stays_outside():
    graph_module = fused(program("loopq"), Limits(widest_factored=128))
    assert len(nodes(graph_module, ops.packed_linear.default)) == 12
    assert len(nodes(graph_module, ops.kronecker.default)) == 12
    assert any("needs a tile of 16 x 16" in line["reason"] for line in report(graph_module))


def test_a_side_that_is_too_long_stays_outside_too():
    graph_module = fused(program("loopq"), Limits(longest_side=8))
    assert len(nodes(graph_module, ops.kronecker.default)) == 12
    assert any("needs a tile of 16 x 16" in line["reason"] for line in report(graph_module))


def test_adapters_of_a_high_rank_stay_outside():
    source = program("loopq")
    Pipeline([FuseAdapters(highest_rank=1)]).run(source.graph_module)
    assert not nodes(source.graph_module, ops.transition_adapter_row.default)
    assert any("a kernel holds 1" in line["reason"] for line in report(source.graph_module))


@pytest.mark.parametrize(
    ("options", "reasons"),
    [
        ({"group_size": 16}, {"groups of 16; kernels have 32, 64, 128": 12, "stays in floating point": 4}),
        ({"scheme": "w4a16"}, {"stays in floating point": 25}),
    ],
)
def test_nothing_is_changed_where_no_kernel_fits(options, reasons):
    source = program("symmetric", **options)
    before = source.graph_module.code
    given = [line["reason"] for line in report(fused(source))]
    assert {part: sum(part in reason for reason in given) for part in reasons} == reasons
    assert len(given) == sum(reasons.values())
    assert source.graph_module.code == before


def test_a_second_run_changes_nothing():
    source = program("loopq")
    fused(source)
    before = source.graph_module.code
    assert not FuseLinears()(source.graph_module).modified and not FuseAdapters()(source.graph_module).modified
    assert source.graph_module.code == before


def test_packing_is_reversible():
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(3, 2)
    assert torch.equal(unpack_codes(pack_codes(codes)), codes)
    assert pack_codes(torch.tensor([[1, -1]], dtype=torch.int8)).tolist() == [[0xF1]]


def test_the_operators_obey_the_rules_of_pytorch():
    x, table = torch.randn(3, 64), torch.ones(2, 2)
    factors = [torch.eye(8)[None], torch.eye(8)[None]]
    rest = (1e-6, torch.ones(1, 64), *factors, table, 1, 32, 4, -8)
    quantize = (x, None, "", "rms", torch.ones(64), None, *rest)
    torch.library.opcheck(ops.quantize_packed.default, quantize)
    torch.library.opcheck(ops.quantize_packed.default, (x, x, "gelu", "layer", None, torch.ones(64), *rest))
    codes, scale = ops.quantize_packed(*quantize)
    weight = torch.randint(0, 255, (1, 2, 5, 16), dtype=torch.uint8)
    linear = (codes, scale, weight, torch.ones(1, 2, 5), torch.ones(5), 0, 32, torch.bfloat16)
    torch.library.opcheck(ops.packed_linear.default, linear)
    tables = [torch.randn(2, size) for size in (1, 64, 64, 3)]
    torch.library.opcheck(ops.transition_adapter_row.default, (x, *tables, torch.randn(64, 3), torch.randn(64, 3), 1))
