"""What a model computes only from its parameters becomes a plain weight, in loops, saved files and ONNX."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import loopq_compile as lq
from loopq_compile.backends.onnx import OnnxExecutable
from loopq_compile.capture.to_graph import capture
from loopq_compile.graph.recurrence import weight_roots
from loopq_compile.program import Program

aten = torch.ops.aten
IDS = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(0))


class Looped(nn.Module):
    """Three iterations of one linear of 16 features, `function(model, x)`."""

    def __init__(self, function=lambda model, x: model.fc(x), make=lambda linear: linear) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.fc, self.head = nn.Embedding(64, 16), make(nn.Linear(16, 16)), nn.Linear(16, 64)
        self.fused, self.gain = nn.Parameter(torch.randn(48, 16) / 4), nn.Parameter(torch.rand(3, 1, 1))
        self.left, self.right = nn.Parameter(torch.randn(16, 2)), nn.Parameter(torch.randn(2, 16))
        self.register_buffer("mask", (torch.rand(16, 16) > 0.5).float())
        self.function = function

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for self.step in range(3):
            x = torch.tanh(self.function(self, x) + x)
        return self.head(x)


def parts_by_slice(m: Looped, x: Tensor) -> Tensor:
    return F.linear(x, m.fused[:16]) * F.linear(x, m.fused[16:32]) + F.linear(x, m.fused[32:])


def parts_by(split) -> object:
    def function(m: Looped, x: Tensor) -> Tensor:
        q, k, v = split(m.fused)
        return F.linear(x, q) * F.linear(x, k) + F.linear(x, v)

    return function


PLAIN = {
    "a cast that changes nothing": (lambda m, x: F.linear(x, m.fc.weight.to(x.dtype), m.fc.bias.to(x.dtype)), ["fc"]),
    "type_as": (lambda m, x: F.linear(x, m.fc.weight.type_as(x)), ["fc"]),
    "float": (lambda m, x: F.linear(x, m.fc.weight.float()), ["fc"]),
    "contiguous, clone, view": (lambda m, x: F.linear(x, m.fc.weight.contiguous().clone().view(16, 16)), ["fc"]),
    "expand_as": (lambda m, x: F.linear(x, m.fc.weight.expand_as(m.mask)), ["fc"]),
    "a mask": (lambda m, x: F.linear(x, m.fc.weight * m.mask), ["fc"]),
    "a transposed weight": (lambda m, x: F.linear(x, m.fc.weight.t()), ["fc"]),
    "a cast, then a transposed product": (lambda m, x: x @ m.fc.weight.double().float().t(), ["fc"]),
    "slices": (parts_by_slice, ["fused_part0", "fused_part1", "fused_part2"]),
    "chunk": (parts_by(lambda w: w.chunk(3)), ["fused_part0", "fused_part1", "fused_part2"]),
    "split": (parts_by(lambda w: w.split([16, 16, 16])), ["fused_part0", "fused_part1", "fused_part2"]),
    "unbind": (parts_by(lambda w: w.view(3, 16, 16).unbind()), ["fused_part0", "fused_part1", "fused_part2"]),
    "slices of columns": (lambda m, x: x @ m.fused.t()[:, :16], ["fused"]),
    "a weight normed in the code": (lambda m, x: F.linear(x, F.normalize(m.fc.weight, dim=1)), ["fc"]),
}
MADE = {
    "weight_norm": parametrizations.weight_norm,
    "weight_norm as it was": nn.utils.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "spectral_norm as it was": nn.utils.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


def compiled(model: nn.Module, **options) -> lq.Program:
    options = {"scheme": "w8a8", "method": "symmetric", "activation": "dynamic", "group_size": 8} | options
    return lq.compile(model.eval(), IDS, **options)


def quantized(program: lq.Program) -> list[str]:
    sites = program.graph_module.meta["loopq"].sites.values()
    return [site.name for site in sites if site.reason is None]


def check(model: nn.Module, names: list[str]) -> lq.Program:
    model.eval()
    with torch.no_grad():
        expected = model(IDS)
    assert torch.equal(Program(capture(model, IDS))(IDS), expected), "folding is exact"
    program = compiled(model)
    assert quantized(program) == names
    assert program.loops.count == 3
    assert float((program(IDS) - expected).norm() / expected.norm()) < 0.05
    return program


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("name", [*PLAIN, *MADE])
def test_a_weight_computed_from_parameters_is_quantized(name):
    if name in PLAIN:
        function, names = PLAIN[name]
        check(Looped(function), names)
    else:
        check(Looped(make=MADE[name]), ["fc"])


def test_the_parameters_of_the_model_are_not_changed():
    model = Looped(PLAIN["slices"][0]).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    program = compiled(model, release_model=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert quantized(program)


STAYS = {
    "a gain for each iteration": lambda m, x: F.linear(x, m.fused * m.gain[m.step])[..., :16] + m.fc(x),
    "a product of two thin matrices": lambda m, x: F.linear(x, m.left @ m.right) + m.fc(x),
}


@pytest.mark.parametrize("name", STAYS)
def test_a_result_that_takes_more_room_stays_and_is_named(name):
    program = compiled(Looped(STAYS[name]))
    assert program.loops.count == 3
    notes = "\n".join(note for entry in program.log for note in entry.notes)
    assert "the weight is computed in the graph" in notes
    assert "remove_parametrizations" in notes


def test_a_second_run_folds_nothing():
    from loopq_compile.graph.fold_weights import fold_weights

    graph_module = capture(Looped(PLAIN["slices"][0]).eval(), IDS)
    before = [node.name for node in graph_module.graph.nodes]
    fold_weights(graph_module)
    assert [node.name for node in graph_module.graph.nodes] == before
    assert all(node.op == "get_attr" for node in weight_roots(graph_module.graph))


class Casted(nn.Linear):
    """Keeps float32 and multiplies in the type of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Golf(nn.Module):
    """Two looped blocks of casted linears, a tied embedding with a soft cap on its logits."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dtype, self.tok_emb = dtype, nn.Embedding(64, 16)
        self.qkv, self.out = Casted(16, 48, bias=False), Casted(16, 16)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tok_emb(input_ids).to(self.dtype)
        for _ in range(3):
            x = x.to(self.dtype)
            q, k, v = (y.unsqueeze(1) for y in self.qkv(F.rms_norm(x, (16,))).chunk(3, -1))
            x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1))
        return 30 * torch.tanh(F.linear(x, self.tok_emb.weight.to(x.dtype)).float() / 30)


def test_casts_that_change_nothing_hinder_neither_rolling_nor_a_cache(tmp_path):
    model = Golf(torch.float32)
    program = compiled(model)
    assert quantized(program) == ["qkv", "out"]
    assert program.loops.describe() == "3 x (qkv, out)"
    assert program.graph_module.meta["loopq"].sites["tok_emb.weight"].reason == "tied to an embedding"
    program.save(tmp_path / "p")
    assert torch.equal(lq.load(tmp_path / "p")(IDS), program(IDS))
    for form in ("unrolled", "rolled"):
        found = torch.as_tensor(OnnxExecutable(program.export_onnx(tmp_path / form, form=form).path)(IDS))
        torch.testing.assert_close(found, program(IDS), rtol=1e-3, atol=1e-3)
    assert program.cached() is not None
    program.export_onnx(tmp_path / "cached", form="rolled", cache=True)


def test_a_weight_is_quantized_in_the_type_of_the_product():
    model = Golf(torch.bfloat16).eval()
    program = compiled(model)
    assert quantized(program) == ["qkv", "out"]
    assert program.loops.describe() == "3 x (qkv, out)"
    with torch.no_grad():
        expected = model(IDS)
    assert float((program(IDS) - expected).norm() / expected.norm()) < 0.05
    assert model.qkv.weight.dtype == torch.float32
    assert program.cached() is not None


class Adapted(nn.Module):
    """A linear of 32 features, an adapter of rank 4, an empty parameter, and experts in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.fc = nn.Embedding(64, 32), nn.Linear(32, 32)
        self.down, self.up = nn.Linear(32, 12), nn.Linear(12, 32)
        self.empty = nn.Parameter(torch.zeros(0, 32))
        self.experts = nn.Parameter(torch.randn(2, 32, 32))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        x = self.fc(x) + self.up(self.down(x)) + F.linear(x, self.empty).sum(-1, keepdim=True)
        return torch.einsum("bsd,edf->bsf", x, self.experts)


def test_what_cannot_be_quantized_stays_in_floating_point_and_is_named():
    model = Adapted().eval()
    program = compiled(model, group_size=32)
    reasons = {site.name: site.reason for site in program.graph_module.meta["loopq"].sites.values()}
    assert reasons["fc"] is None
    assert reasons["up"] == "group_size=32 does not divide its 12 inputs"
    assert reasons["empty"] == "its weight is empty"
    notes = "\n".join(note for entry in program.log for note in entry.notes)
    line = "experts stays in floating point: aten.einsum.default is not a linear layer (2 x 32 x 32: 2,048 parameters)"
    assert line in notes
    assert line in program.summary()


@pytest.mark.parametrize("options", [{"quantize": ("up",)}, {"skip": ("fc", "down")}])
def test_a_group_size_that_fits_nothing_or_not_the_layer_named_is_an_error(options):
    with pytest.raises(lq.LoopQError, match="does not divide the 12 inputs of 'up'"):
        compiled(Adapted(), group_size=32, **options)
