"""Activation functions and norms before quantization, in the forms in which models write them."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import loopq_compile as lq
from loopq_compile.graph.state import get_state
from loopq_compile.operators import ops
from loopq_compile.passes.fuse.fuse_linears import FuseLinears
from loopq_compile.passes.fuse.fusion import RESULTS
from loopq_compile.passes.fuse.producers import match_front
from loopq_compile.pipeline import Pipeline

WIDTH = 64


class SpelledNorm(nn.Module):
    """As Hugging Face writes it, `inside` keeps float32 through the gain, as Gemma does."""

    def __init__(self, inside=False):
        super().__init__()
        self.weight, self.inside = nn.Parameter(torch.rand(WIDTH) + 0.5), inside

    def forward(self, x):
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        if self.inside:
            return (wide * (1.0 + self.weight.float())).type_as(x)
        return self.weight * wide.to(x.dtype)


def new_gelu(x):
    return 0.5 * x * (1.0 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * torch.pow(x, 3.0))))


FUNCTIONS = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "spelled gelu_tanh": new_gelu,
    "relu": F.relu,
    "silu": F.silu,
}
NORMS = {"rms_norm": nn.RMSNorm, "layer_norm": nn.LayerNorm, "spelled rms_norm": lambda width: SpelledNorm()}
NORMS["spelled inside rms_norm"] = lambda width: SpelledNorm(True)


class Looped(nn.Module):
    def __init__(self, function, norm, gated=False):
        super().__init__()
        self.norm, self.function = norm(WIDTH), function
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.other = nn.Linear(WIDTH, 2 * WIDTH) if gated else None

    def forward(self, x):
        for _ in range(2):
            y = self.norm(x)
            hidden = self.function(self.up(y))
            x = x + self.down(hidden if self.other is None else hidden * self.other(y))
        return x


def compiled(function, norm, dtype=torch.float32, gated=False):
    torch.manual_seed(0)
    model = Looped(FUNCTIONS[function], NORMS[norm], gated).eval().to(dtype)
    return lq.compile(model, torch.randn(2, 5, WIDTH).to(dtype), scheme="w4a4", method="symmetric")


def fused(program):
    graph_module = Pipeline([FuseLinears()]).run(program.graph_module)
    return graph_module, [line["parts"] for line in get_state(graph_module).results[RESULTS] if line["parts"]]


CASES = [(function, "layer_norm", False) for function in FUNCTIONS] + [("gelu", norm, True) for norm in NORMS]


@pytest.mark.parametrize(("function", "norm", "gated"), CASES)
def test_taken_in_and_the_same_in_float32(function, norm, gated):
    program, x = compiled(function, norm, gated=gated), torch.randn(3, 7, WIDTH)
    expected = program(x)
    graph_module, parts = fused(program)
    front = ("gated " if gated else "") + function.removeprefix("spelled ")
    assert [line[0] for line in parts] == [norm.split()[-1], front] * 2
    assert not graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.rsqrt.default)
    difference = (program(x) - expected).abs()
    assert difference.max() < 0.1 * expected.abs().max() and difference.mean() < 0.003 * expected.abs().max()


@pytest.mark.parametrize(("norm", "kind"), [("spelled rms_norm", "rms_rounded"), ("spelled inside rms_norm", "rms")])
def test_half_precision_rounds_where_the_model_does(norm, kind):
    """The fused norm of one token, against the model's own, to the last bit of bfloat16."""
    program = compiled("silu", norm, torch.bfloat16)
    graph_module, parts = fused(program)
    assert [line[0] for line in parts] == ["rms_norm", "silu"] * 2
    node = next(n for n in graph_module.graph.nodes if n.target is ops.quantize_packed.default)
    assert node.args[3] == kind and node.args[6] == 1e-5
    torch.manual_seed(1)
    module, x = NORMS[norm](WIDTH).to(torch.bfloat16), torch.randn(50, WIDTH).to(torch.bfloat16)
    gain = module.weight if kind == "rms_rounded" else 1.0 + module.weight.float()
    table = torch.full((1, 1), 2.0**-3)
    front = (None, "", kind, gain.detach(), None, 1e-5, None, None, None)
    codes, _ = ops.quantize_packed(x, *front, table, 0, 32, 8, 0)
    assert torch.equal(codes, ops.quantize(module(x).detach(), table[0], 32, -128, 127))


def test_a_norm_that_others_read_stays_and_the_report_says_who():
    class PostNorm(Looped):
        def forward(self, x):
            for _ in range(2):
                x = self.norm(x + self.down(self.function(self.up(x))))
            return x

    torch.manual_seed(0)
    model = PostNorm(F.gelu, nn.LayerNorm).eval()
    program = lq.compile(model, torch.randn(2, 5, WIDTH), scheme="w4a4", method="symmetric")
    graph_module, _ = fused(program)
    reasons = {line["reason"] for line in get_state(graph_module).results[RESULTS]}
    assert any("layer_norm" in reason and "also read by add" in reason for reason in reasons)


class Changed(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.gain, self.change = nn.Parameter(torch.ones(WIDTH)), change

    def forward(self, x):
        return self.change(x, self.gain)


@pytest.mark.parametrize(
    ("change", "is_norm"),
    [
        (lambda x, gain: (torch.rsqrt(1e-5 + x.pow(2).mean(-1, keepdim=True)) * x) * gain, True),
        (lambda x, gain: gain * (x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 1e-5)), False),
        (lambda x, gain: gain * (x * torch.rsqrt(x.pow(2).mean(-2, keepdim=True) + 1e-5)), False),
        (lambda x, gain: gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + gain[:1])), False),
        (lambda x, gain: gain * (x * torch.rsqrt((x * 2).pow(2).mean(-1, keepdim=True) + 1e-5)), False),
        (lambda x, gain: x * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)), False),
    ],
    ids=["turned round", "cubes", "over tokens", "epsilon is a tensor", "of another tensor", "gain for every token"],
)
def test_what_is_nearly_a_norm_is_none(change, is_norm):
    graph = torch.export.export(Changed(change), (torch.randn(3, WIDTH),)).graph
    (result,) = graph.output_node().args[0]
    front = match_front(result)
    assert (front is not None) == is_norm
    assert front is None or (front.norm == "rms" and front.eps == 1e-5 and front.gain is not None)
