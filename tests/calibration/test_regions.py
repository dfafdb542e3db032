"""Elementwise regions: the same numbers and gradients, one function for equal regions, products left alone."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from loopq_compile.calibration import regions
from loopq_compile.calibration.regions import Region, fuse_regions
from loopq_compile.operators import fusion
from loopq_compile.operators.fusion import fusing


class Layers(nn.Module):
    """Two layers that are equal but for their weights, and a last product."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.gain = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x):
        for layer in self.layers[:2]:
            x = x + F.silu(layer(F.rms_norm(x, (8,), self.gain))) * 0.5
        return self.layers[2](self.layers[2](x).unsqueeze(0))


@pytest.fixture(scope="module")
def exported():
    torch.manual_seed(0)
    rows = {0: torch.export.Dim("rows", min=2, max=64)}
    return torch.export.export(Layers(), (torch.rand(5, 8),), dynamic_shapes=(rows,)).module()


def fused_copy(exported):
    module = copy.deepcopy(exported)
    fuse_regions(module)
    return module, [item for item in module.modules() if isinstance(item, Region)]


def gradients(module, x):
    x = x.clone().requires_grad_()
    y = module(x)
    return y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])


def test_a_region_computes_what_its_operators_compute_and_leaves_products_alone(exported):
    module, found = fused_copy(exported)
    inside = {node.target for region in found for node in region._plain.graph.nodes}
    assert torch.ops.aten.silu.default in inside and torch.ops.aten.linear.default not in inside
    left = [node.target for node in module.graph.nodes if node.op == "call_function"]
    assert left.count(torch.ops.aten.linear.default) == 4
    assert torch.ops.aten.unsqueeze.default in left, "a view between products is no gain"
    assert torch.ops.aten.silu.default not in left
    x = torch.rand(5, 8)
    for got, wanted in zip(gradients(module, x), gradients(exported, x), strict=True):
        assert got.equal(wanted)


def test_compiled_regions_have_the_same_gradients(exported):
    module, _ = fused_copy(exported)
    x = torch.rand(5, 8)
    with fusing():
        found = gradients(module, x)
    for got, wanted in zip(found, gradients(exported, x), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_equal_regions_share_one_function(exported):
    _, first = fused_copy(exported)
    _, second = fused_copy(exported)
    assert {id(region) for region in first} == {id(region) for region in second}


def test_after_some_combinations_of_shapes_one_function_serves_the_others(exported, monkeypatch):
    monkeypatch.setattr(regions, "_SHAPES", 2)
    monkeypatch.setattr(regions, "fused", lambda function: function)
    region = Region(fused_copy(exported)[1][0]._plain)
    with fusing():
        for rows in range(2, 7):
            count = len([node for node in region._plain.graph.nodes if node.op == "placeholder"])
            region(*[torch.rand(rows, 8)] * count)
    assert len(region._compiled) == 3


def test_recomputation_may_stop_inside_a_region(exported):
    """Torch's checkpoint leaves by an exception when it has all saved tensors; that is not a failure to compile."""
    norms = torch.ops.aten.rms_norm.default
    last = next(item for item in fused_copy(exported)[1] if norms not in {n.target for n in item._plain.graph.nodes})
    inputs = [torch.rand(5, 8, requires_grad=True) for node in last._plain.graph.nodes if node.op == "placeholder"]

    def total(result):
        return sum(item.square().sum() for item in (result if isinstance(result, tuple) else (result,)))

    wanted = torch.autograd.grad(total(last._plain(*inputs)), inputs)
    with fusing(), warnings.catch_warnings():
        warnings.simplefilter("error")
        found = torch.autograd.grad(total(checkpoint(last, *inputs, use_reentrant=False)), inputs)
    for got, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert not fusion._broken
