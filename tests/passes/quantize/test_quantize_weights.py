"""`quantize-weights` after chains, its learnable form, and `pack-weights`, which folds all of it."""

import pytest
import torch

from loopq_compile.calibration.ranges import weight_scale
from loopq_compile.graph.constants import chain_name, constant_nodes, evaluate
from loopq_compile.graph.insert import add_constant, call, inserting
from loopq_compile.graph.state import get_state, get_tensor, set_tensor
from loopq_compile.graph.weights import site_calls, weight_chain
from loopq_compile.operators import ops
from loopq_compile.passes.quantize.pack_weights import PackWeights
from loopq_compile.passes.quantize.quantize_weights import QuantizeWeights
from tests.passes.test_rewriting import nodes, prepared
from tests.tiny import tokens

_aten = torch.ops.aten


def with_factor_per_loop(graph_module, site="layers.0.down"):
    """Multiplies the weight of `site` by a row of a table `[3, 128]`, a different one in each loop."""
    table = add_constant(graph_module, "factors", 1 + torch.rand(3, 128, generator=torch.Generator().manual_seed(0)))
    linears = next(linears for found, linears in site_calls(graph_module) if found.name == site)
    for row, linear in enumerate(linears):
        weight = linear.args[1]
        with inserting(graph_module.graph, before=linears[0], tag=None, site=site):
            chosen = call(graph_module.graph, _aten.select.int, table, 0, row)
            scaled = call(graph_module.graph, _aten.mul.Tensor, weight, chosen)
        linear.update_arg(1, scaled)
    graph_module.recompile()
    return graph_module


def scales(graph_module):
    found = {n.args[1] for n in nodes(graph_module, ops.quantize.default) if n in constant_nodes(graph_module.graph)}
    return {chain_name(graph_module, node): value for node, value in evaluate(graph_module, found) if node in found}


@pytest.mark.parametrize("method", ["minmax", "mse"])
@pytest.mark.parametrize("size", [32, -1])
def test_learnable_scales_start_as_those_of_the_weight(method, size):
    graph_module = prepared(QuantizeWeights(learnable=True), weight_range=method, group_size=size)
    for site in [site for site in get_state(graph_module).sites.values() if not site.reason]:
        weight = get_tensor(graph_module, site.weight)
        expected = weight_scale(weight, size if size != -1 else site.shape[1], 4, method, -8)
        clip = get_tensor(graph_module, f"{site.weight}_clip")
        got = ops.dynamic_scale(weight.detach(), clip, size if size != -1 else site.shape[1], -8)
        torch.testing.assert_close(got, expected.detach(), rtol=1e-6, atol=0)
        assert not get_tensor(graph_module, f"{site.weight}_rounding").any()
    plain = prepared(QuantizeWeights(), weight_range=method, group_size=size)
    with torch.no_grad():
        torch.testing.assert_close(graph_module(tokens(5))[0], plain(tokens(5))[0])


def test_what_calibration_may_learn_is_marked():
    graph_module = prepared(QuantizeWeights(learnable=True))
    marked = {node.target: node.meta["loopq_learn"] for node in graph_module.graph.nodes if "loopq_learn" in node.meta}
    assert len(marked) == 7
    assert marked["layers.0.down.weight_clip"] == "weight_clip"
    assert "layers.0.down.weight_rounding" not in marked, "only latent weights are learned"


def test_the_rounding_offset_changes_integers_and_not_scales():
    graph_module = prepared(QuantizeWeights(rounding=True))
    before = scales(graph_module)
    assert "layers.0.down.weight_scale" in dict(graph_module.named_buffers()), "fixed scales"
    step = torch.ones_like(get_tensor(graph_module, "layers.0.down.weight_rounding"))
    set_tensor(graph_module, "layers.0.down.weight_rounding", step)
    packed = PackWeights()(graph_module).graph_module
    plain = PackWeights()(prepared(QuantizeWeights())).graph_module
    moved = get_tensor(packed, "layers.0.down.weight_codes") - get_tensor(plain, "layers.0.down.weight_codes")
    assert set(moved.unique().tolist()) <= {0, 1} and moved.float().mean() > 0.8, "one step up unless clipped"
    for name, scale in before.items():
        torch.testing.assert_close(get_tensor(packed, f"{name.removesuffix('_scale')}_scale"), scale)


@pytest.mark.parametrize("learnable", [False, True])
def test_packing_folds_every_chain_and_keeps_the_numbers(learnable):
    passes = [QuantizeWeights(learnable=learnable)]
    before = with_factor_per_loop(prepared())
    for item in passes:
        before = item(before).graph_module
    before.recompile()
    with torch.no_grad():
        expected = before(tokens(5))[0]
    assert PackWeights()(before).modified
    before.recompile()
    with torch.no_grad():
        assert torch.equal(before(tokens(5))[0], expected)
    held = {name for name, _ in [*before.named_parameters(), *before.named_buffers()]}
    assert {f"layers.0.down.weight_loop{row}_codes" for row in range(3)} <= held
    assert {f"layers.0.down.weight_loop{row}_scale" for row in range(3)} <= held
    assert "layers.0.up.weight_codes" in held
    assert not {name for name in held if name.endswith(("_clip", "_rounding", "down.weight", "factors"))}
    for _, linears in site_calls(before):
        for linear in linears:
            assert [node.op for node in weight_chain(linear)] == ["get_attr", "call_function"]
    assert not PackWeights()(before).modified


def test_a_second_run_finds_every_weight_quantized():
    for learnable in (False, True):
        graph_module = with_factor_per_loop(prepared())
        assert QuantizeWeights(learnable)(graph_module).modified
        graph_module.recompile()
        printed = graph_module.code
        assert not QuantizeWeights(not learnable)(graph_module).modified
        graph_module.recompile()
        assert graph_module.code == printed


def test_two_ways_of_rounding_one_weight_stay_apart():
    """As a custom pass may do: another width in the last loop."""
    graph_module = prepared(QuantizeWeights())
    linears = dict((site.name, linears) for site, linears in site_calls(graph_module))["layers.0.up"]
    scale, weight = linears[0].args[1].args[1], weight_chain(linears[0])[0]
    with inserting(graph_module.graph, before=linears[0], tag=None, site="layers.0.up"):
        codes = call(graph_module.graph, ops.quantize.default, weight, scale, 32, -2, 1)
        linears[-1].update_arg(1, call(graph_module.graph, ops.dequantize.default, codes, scale, 32))
    graph_module.recompile()
    with torch.no_grad():
        expected = graph_module(tokens(5))[0]
        PackWeights()(graph_module).graph_module.recompile()
        assert torch.equal(graph_module(tokens(5))[0], expected)
