"""Capture: a program computes what its model computes, for every batch and length, and refuses clearly."""

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from packaging import version
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import loopq_compile as lq
from loopq_compile import CaptureError, LoopQError
from tests import zoo
from tests.small_models import IDS, Masked, Small, additive, captured, ids, padding, same


@pytest.mark.parametrize("name", zoo.ZOO)
def test_programs_of_the_zoo_compute_what_their_models_do(name):
    model, program = zoo.model_of(name), zoo.tagged(name)
    options = {"use_cache": False} if name == "llama" else {}
    for batch, length in ((1, 1), (1, 5), (3, 1), (4, 9), (5, 5)):
        inputs = zoo.example(model, batch, length)
        expected = model(*inputs, **options)
        found = program(*inputs, **options)
        assert type(found) is type(expected)
        torch.testing.assert_close(
            pytree.tree_leaves(found), pytree.tree_leaves(expected), rtol=1e-5, atol=1e-5, msg=f"{batch} x {length}"
        )


@pytest.mark.parametrize("name", [name for name in zoo.ZOO if name != "llama"])
def test_weights_are_the_models_own_and_exist_once(name):
    mine = [tensor.data_ptr() for tensor in zoo.model_of(name).state_dict(keep_vars=True).values()]
    found = [tensor.data_ptr() for _, tensor in zoo.tagged(name).graph_module.named_parameters()]
    assert found
    assert len(found) == len(set(found))
    assert set(found) <= set(mine)


def test_tied_weights_have_one_name_the_first():
    names = [name for name, _ in zoo.tagged("tied").graph_module.named_parameters()]
    assert "embed.weight" in names
    assert "lm_head.weight" not in names


INPUTS = {
    "a tensor": lambda b, s: ((ids(b, s),), {}),
    "a padding mask": lambda b, s: ((ids(b, s), padding(b, s)), {}),
    "an additive mask": lambda b, s: ((ids(b, s), additive(b, s)), {}),
    "keywords": lambda b, s: ((), {"input_ids": ids(b, s), "mask": padding(b, s)}),
    "keywords in another order": lambda b, s: ((), {"mask": padding(b, s), "input_ids": ids(b, s)}),
    "a flag": lambda b, s: ((), {"input_ids": ids(b, s), "double": True}),
    "a flag by position": lambda b, s: ((ids(b, s), None, True), {}),
    "a keyword-only number": lambda b, s: ((), {"input_ids": ids(b, s), "factor": 0.5}),
    "a keyword-only tensor": lambda b, s: ((), {"input_ids": ids(b, s), "factor": torch.full((b, 1, 1), 0.5)}),
    "a vector per feature": lambda b, s: ((), {"input_ids": ids(b, s), "factor": torch.linspace(0, 1, 16)}),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_inputs_may_come_in_many_forms(kind):
    model = Masked()
    args, kwargs = INPUTS[kind](2, 7)
    program = captured(model, kwargs or args)
    for batch, length in ((2, 7), (1, 1), (4, 5), (3, 3)):
        args, kwargs = INPUTS[kind](batch, length)
        same(program, model, *args, **kwargs)


@pytest.mark.parametrize(("batch", "length"), [(1, 7), (2, 1), (1, 1), (5, 5), (1, 2)])
@pytest.mark.parametrize("kind", ["a padding mask"])
def test_examples_of_special_size_do_not_fix_the_program(kind, batch, length):
    model = Masked()
    args, kwargs = INPUTS[kind](batch, length)
    program = captured(model, kwargs or args)
    args, kwargs = INPUTS[kind](3, 4)
    same(program, model, *args, **kwargs)


def test_a_feature_size_equal_to_the_length_stays_fixed():
    class Conditioned(Small):
        def forward(self, input_ids: Tensor, condition: Tensor) -> Tensor:
            return self.linear(self.embed(input_ids) + self.linear(condition)[:, None])

    model = Conditioned()
    program = captured(model, (ids(2, 16), torch.randn(2, 16)))
    same(program, model, ids(3, 5), torch.randn(3, 16))
    with pytest.raises(LoopQError, match=r"takes condition: float32\[batch, 16\]"):
        program(ids(3, 5), torch.randn(3, 5))


@pytest.mark.parametrize("shape", [(2, 16), (2, 5, 16)])
def test_float_inputs(shape):
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    program = captured(model, torch.randn(shape))
    for sizes in ((1, *shape[1:]), (7, *(1 for _ in shape[1:-1]), 16)):
        same(program, model, torch.randn(sizes))


def test_inputs_that_share_memory_with_each_other_or_the_model_stay_inputs_of_their_own():
    model = Small()
    model.forward = lambda input_ids, a, b: model.embed(input_ids) * a + b * model.scale
    row, wide = torch.rand(16), torch.rand(40)
    parameter = nn.Parameter(torch.rand(16))
    for a, b in ((row, row), (model.scale, row), (wide[:16], wide[4:20]), (parameter, parameter[:1].expand(16))):
        program = captured(model, (IDS, a, b))
        same(program, model, ids(3, 4), torch.rand(16), torch.rand(16))
    torch.testing.assert_close(model.scale, torch.full((16,), 2.0))
    assert parameter.requires_grad


@dataclass
class Result:
    logits: Tensor
    state: Tensor


torch.export.register_dataclass(Result, serialized_type_name="tests.capture.test_capture.Result")


class Pair(NamedTuple):
    logits: Tensor
    state: Tensor


OUTPUTS = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x, x + 1),
    "list": lambda x: [x, [x + 1]],
    "dict": lambda x: {"logits": x, "states": (x, x * 2)},
    "named tuple": lambda x: Pair(x, x + 1),
    "dataclass": lambda x: Result(x, x + 1),
    "None beside": lambda x: (x, None),
    "the same twice": lambda x: (x, x),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_keep_their_structure(kind):
    class Returning(Small):
        def forward(self, input_ids: Tensor) -> Any:
            return OUTPUTS[kind](self.embed(input_ids))

    model = Returning()
    found, expected = captured(model)(IDS), model(IDS)
    assert type(found) is type(expected)
    assert pytree.tree_structure(found) == pytree.tree_structure(expected)
    torch.testing.assert_close(pytree.tree_leaves(found), pytree.tree_leaves(expected))


def test_numbers_beside_tensors_are_returned_as_they_were():
    class Counting(Small):
        def forward(self, input_ids: Tensor) -> Any:
            return self.embed(input_ids), 3, "three"

    assert captured(Counting())(IDS)[1:] == (3, "three")


def test_an_input_that_is_returned_as_it_is():
    class Echo(Small):
        def forward(self, input_ids: Tensor) -> Any:
            return input_ids, self.embed(input_ids)

    assert torch.equal(captured(Echo())(IDS)[0], IDS)


def no_grad_inside(self: Small, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = self.linear(x)
    return self.linear(x)


def grad_inside(self: Small, x: Tensor) -> Tensor:
    with torch.enable_grad():
        return self.linear(x)


def in_place(self: Small, x: Tensor) -> Tensor:
    y = self.linear(x)
    y += x
    y.mul_(self.scale).masked_fill_(y > 1, 0.0)
    y[:, 0] = 0
    return y


def views(self: Small, x: Tensor) -> Tensor:
    y = x.clone()
    y.view(-1, 16)[0] += 1
    return y.transpose(0, 1).contiguous().transpose(0, 1)


def split_heads(self: Small, x: Tensor) -> Tensor:
    b, s, d = x.shape
    return self.linear(x).view(b, s, 4, d // 4).transpose(1, 2).reshape(b, s, d)


def shape_branch(self: Small, x: Tensor) -> Tensor:
    return self.linear(x) if x.shape[-1] == 16 else x


def new_tensors(self: Small, x: Tensor) -> Tensor:
    positions = torch.arange(x.shape[1], device=x.device)
    return x + positions[:, None] * torch.tensor([0.5]) + torch.zeros_like(x) + torch.ones(16)


FEATURES = {
    "no_grad": no_grad_inside,
    "enable_grad": grad_inside,
    "in-place": in_place,
    "in-place on a view": views,
    "dropout": lambda self, x: self.drop(self.linear(F.dropout(x, 0.5, self.training))),
    "heads": split_heads,
    "a branch on a size": shape_branch,
    "new tensors": new_tensors,
    "where": lambda self, x: torch.where(x.sum() > 0, self.linear(x), x),
    "vmap": lambda self, x: torch.vmap(self.linear)(x),
    "nested vmap": lambda self, x: torch.vmap(torch.vmap(lambda row: self.linear(row) * row.sum()))(x),
    "checkpoint": lambda self, x: torch.utils.checkpoint.checkpoint(self.linear, x, use_reentrant=False),
    "conv1d": lambda self, x: F.conv1d(x.transpose(1, 2), self.linear.weight[:, :, None]).transpose(1, 2),
    "einsum": lambda self, x: torch.einsum("bsd,ed->bse", x, self.linear.weight),
    "norms": lambda self, x: F.rms_norm(self.norm(x), (16,), self.scale),
    "cumulative": lambda self, x: x.cumsum(1) + x.flip(1).roll(1, 1),
    "weight norm": lambda self, x: F.linear(x, self.linear.weight / self.linear.weight.norm(dim=1, keepdim=True)),
    "autocast": lambda self, x: autocast(self, x),
}


def autocast(self: Small, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        return self.linear(x.float())


@pytest.mark.parametrize("kind", FEATURES)
def test_what_models_do_inside_is_captured(kind):
    model = Small(FEATURES[kind])
    if kind == "nested vmap" and version.parse(torch.__version__) < version.parse("2.13"):
        with pytest.raises(CaptureError, match=r"nested torch\.vmap.*torch 2\.13 or newer"):
            captured(model)
        return
    program = captured(model)
    for batch, length in ((2, 7), (1, 1), (3, 4)):
        same(program, model, ids(batch, length))
    targets = [str(node.target) for node in program.graph_module.graph.nodes]
    assert not [target for target in targets if "set_grad" in target or "vmap" in target or target.endswith("_.Tensor")]


def test_an_autocast_block_computes_in_low_precision():
    def low(self: Small, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.linear(x).float()

    model = Small(low)
    program = captured(model)
    torch.testing.assert_close(program(IDS), model.eval()(IDS), rtol=1e-2, atol=1e-2)


def test_layers_in_an_autocast_block_are_quantized():
    def low(self: Small, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.linear(torch.tanh(self.linear(x))).float()

    model = Small(low).eval()
    program = lq.compile(model, IDS, scheme=lq.Scheme(8, 16, group_size=16), method="symmetric")
    assert "Small: 2 x (linear)\nw8a16" in program.summary()
    torch.testing.assert_close(program(ids(3, 4)), model(ids(3, 4)), rtol=5e-2, atol=5e-2)


def test_the_model_is_left_as_it_was():
    model = Small(FEATURES["dropout"]).train()
    model.norm.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = [parameter.requires_grad for parameter in model.parameters()]
    captured(model)
    assert model.training and model.drop.training and not model.norm.training
    assert [parameter.requires_grad for parameter in model.parameters()] == gradients
    torch.testing.assert_close(dict(model.state_dict()), before)


def test_training_mode_is_restored_after_an_error():
    model = Small(lambda self, x: x if x.sum() > 0 else -x).train()
    with pytest.raises(CaptureError):
        captured(model)
    assert model.training


def test_low_precision_models():
    model = Small(lambda self, x: self.linear(x)).to(torch.bfloat16)
    program = captured(model)
    assert program(IDS).dtype == torch.bfloat16
    same(program, model, ids(3, 4))


def test_a_program_is_independent_of_later_captures():
    model = Small(lambda self, x: self.linear(x))
    first, second = captured(model), captured(copy.deepcopy(model))
    assert torch.equal(first(IDS), second(IDS))


def test_a_causal_mask_of_infinities_in_a_buffer_is_no_damage():
    model = Small(lambda self, x: x + self.mask.softmax(-1)[: x.shape[1], : x.shape[1]].sum())
    model.register_buffer("mask", torch.full((32, 32), float("-inf")).triu(1))
    same(captured(model), model, IDS)


class MarkedRecurrence(nn.Module):
    """A method that is hidden from Dynamo, as Parcae's recurrence is."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    @torch._dynamo.disable(recursive=False)
    def run(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.linear(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x)


def test_methods_hidden_from_dynamo_are_captured_and_stay_hidden():
    model, x, marked = MarkedRecurrence(), torch.randn(2, 8), MarkedRecurrence.run
    with torch.no_grad():
        assert captured(model, x)(x).equal(model(x))
    assert MarkedRecurrence.run is marked
