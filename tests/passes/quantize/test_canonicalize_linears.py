"""`canonicalize-linears`: changes what it should, does not touch anything else, does nothing in a second run."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loopq_compile.capture.to_graph import capture
from loopq_compile.graph.state import get_state, get_tensor
from loopq_compile.graph.verify import verify_tags
from loopq_compile.passes.loops.tag_loops import TagLoops
from loopq_compile.passes.quantize.canonicalize_linears import CanonicalizeLinears
from loopq_compile.pipeline import Pipeline
from loopq_compile.program import Program

aten = torch.ops.aten
X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


class Product(nn.Module):
    """`function(x, weight, bias)` with a square weight."""

    def __init__(self, function) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.function = function
        self.weight, self.bias = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.bias)


def addmm(bias: Tensor, x: Tensor, weight: Tensor, **scales: float) -> Tensor:
    return torch.addmm(bias, x.flatten(0, 1), weight, **scales).view(x.shape)


def rewritten(model: nn.Module) -> tuple[Program, bool]:
    graph_module = capture(model, X)
    result = CanonicalizeLinears()(graph_module)
    graph_module.recompile()
    torch.testing.assert_close(Program(graph_module)(X), model(X), rtol=1e-5, atol=1e-5)
    return Program(graph_module), result.modified


def targets(program: Program) -> list[object]:
    return [node.target for node in program.graph_module.graph.nodes if node.op == "call_function"]


CHANGED = {
    "x @ w": lambda x, w, b: x @ w,
    "x @ w.t()": lambda x, w, b: x @ w.t(),
    "x @ w.T": lambda x, w, b: x @ w.T,
    "x @ w.transpose": lambda x, w, b: x @ w.transpose(-1, -2),
    "x @ w.permute": lambda x, w, b: x @ w.permute(1, 0),
    "x @ w + x @ w": lambda x, w, b: x @ w + (x + 1) @ w,
    "mm": lambda x, w, b: torch.mm(x.flatten(0, 1), w).view(x.shape),
    "addmm": lambda x, w, b: addmm(b, x, w),
    "addmm with w.t()": lambda x, w, b: addmm(b, x, w.t()),
    "linear and x @ w.t()": lambda x, w, b: F.linear(x, w, b) + x @ w.t(),
}
UNCHANGED = {
    "linear": lambda x, w, b: F.linear(x, w, b),
    "w @ x": lambda x, w, b: w @ x.transpose(1, 2),
    "x @ w and linear(x, w)": lambda x, w, b: x @ w + F.linear(x, w),
    "w as data": lambda x, w, b: x @ w * w[0, 0],
    "addmm with alpha": lambda x, w, b: addmm(b, x, w, alpha=0.5),
    "addmm with beta": lambda x, w, b: addmm(b, x, w, beta=2.0),
    "w @ w": lambda x, w, b: x + (w @ w)[0],
    "x @ x": lambda x, w, b: x @ x.transpose(1, 2) @ x + b,
}


@pytest.mark.parametrize("name", CHANGED)
def test_products_with_a_weight_become_linear(name):
    program, modified = rewritten(Product(CHANGED[name]))
    assert modified
    assert aten.linear.default in targets(program)
    assert not {aten.mm.default, aten.addmm.default, aten.matmul.default} & set(targets(program))


@pytest.mark.parametrize("name", UNCHANGED)
def test_other_products_stay(name):
    model = Product(UNCHANGED[name])
    before = targets(Program(capture(model, X)))
    program, modified = rewritten(model)
    assert not modified
    assert targets(program) == before


@pytest.mark.parametrize("name", [*CHANGED, *UNCHANGED])
def test_a_second_run_changes_nothing(name):
    program, _ = rewritten(Product((CHANGED | UNCHANGED)[name]))
    before = targets(program)
    assert not CanonicalizeLinears()(program.graph_module).modified
    assert targets(program) == before


def test_a_bias_of_addmm_becomes_the_bias_of_the_linear():
    program, _ = rewritten(Product(CHANGED["addmm"]))
    (linear,) = (node for node in program.graph_module.graph.nodes if node.target is aten.linear.default)
    assert [argument.target for argument in linear.args[1:]] == ["weight", "bias"]


def test_a_weight_behind_x_at_w_is_stored_transposed_and_the_model_keeps_its_own():
    model = Product(CHANGED["x @ w"])
    program, _ = rewritten(model)
    assert torch.equal(get_tensor(program.graph_module, "weight"), model.weight.t())
    (node,) = (node for node in program.graph_module.graph.nodes if node.target == "weight")
    assert node.meta["val"].shape == (8, 8)


def test_a_weight_used_in_several_forms_is_reported():
    graph_module = capture(Product(UNCHANGED["w as data"]), X)
    CanonicalizeLinears()(graph_module)
    assert get_state(graph_module).run.notes == ["weight: used in several forms, its products stay as they are"]


def test_a_weight_read_by_two_nodes_is_one_weight():
    """A custom pass may fetch a weight a second time; transposing it for one reader would break the other."""
    model = Product(UNCHANGED["w as data"])
    graph_module = capture(model, X)
    first = next(node for node in graph_module.graph.nodes if node.target == "weight")
    with graph_module.graph.inserting_after(first):
        second = graph_module.graph.get_attr("weight")
    reader = next(user for user in first.users if user.target is not aten.matmul.default)
    reader.replace_input_with(first, second)
    CanonicalizeLinears()(graph_module)
    graph_module.recompile()
    torch.testing.assert_close(Program(graph_module)(X), model(X), rtol=1e-5, atol=1e-5)


def test_loop_tags_stay():
    class Looped(Product):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = torch.tanh(addmm(self.bias, x, self.weight)) @ self.weight
            return x

    graph_module = Pipeline([TagLoops(), CanonicalizeLinears()]).run(capture(Looped(None), X))
    verify_tags(graph_module)
    assert [entry.modified for entry in get_state(graph_module).log] == [True, True]
