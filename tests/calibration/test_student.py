"""The differentiable form of a program: the same numbers, and gradients summed over loops."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from loopq_compile.calibration import weight_chain
from loopq_compile.calibration.student import Student
from loopq_compile.graph.state import get_tensor, set_tensor
from loopq_compile.passes.learn.calibrate import find_learnables
from loopq_compile.passes.quantize.latent_weights import LatentWeights
from loopq_compile.passes.transforms.widen import loop_groups, widen
from tests.calibration.tools import learned_tensors, prepared
from tests.tiny import tokens


@pytest.fixture(scope="module")
def program():
    return prepared(loops=3)


@pytest.mark.parametrize("segments", [1, 3, None, 40])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_student_computes_what_the_program_computes(program, segments, recompute):
    student = Student(program, [], recompute, segments)
    for inputs in (tokens(7), tokens(8, 1, 5)):
        with torch.no_grad():
            expected = program(inputs)
            results, _ = student.run([inputs], {})
        for result, wanted in zip(results, expected, strict=True):
            torch.testing.assert_close(result, wanted, rtol=1e-6, atol=1e-6)


def test_the_student_of_the_captured_graph_computes_what_the_model_computes(program):
    from loopq_compile.graph.state import get_state
    from tests.tiny import tiny_model

    with torch.no_grad():
        results, _ = Student(get_state(program).run.teacher).run([tokens(7)], {})
        expected = tiny_model(3)(tokens(7))
    torch.testing.assert_close(results[0], expected["logits"], rtol=1e-6, atol=1e-6)


def test_a_graph_whose_linears_are_not_listed_is_cut_as_well():
    """A teacher of 24 layers and four loops as one segment took minutes to prepare, in every pass that learns."""
    from loopq_compile.graph.state import get_state

    teacher = get_state(prepared(loops=40)).run.teacher
    segments = Student(teacher, recompute=False, learned=())._segments
    assert len(segments) > 4 and max(len(x.module.graph.nodes) for x in segments) < 400


def test_values_take_the_place_of_constants(program):
    student = Student(program)
    name = next(name for name in student.tensors if name.endswith(".left"))
    with torch.no_grad():
        same, _ = student.run([tokens(7)], {name: student.tensors[name].clone()})
        other, _ = student.run(
            [tokens(7)], {name: student.tensors[name] + 0.1 * torch.rand(student.tensors[name].shape)}
        )
        before, _ = student.run([tokens(7)], {})
    assert same[0].equal(before[0]) and not other[0].equal(before[0])
    assert get_tensor(program, name).equal(student.tensors[name]), "the program keeps its own"


def gradients(program, recompute, segments=None):
    student = Student(program, [], recompute, segments)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in learned_tensors(program).items()}
    results, _ = student.run([tokens(3)], leaves)
    results[0].square().mean().backward()
    return {name: leaf.grad for name, leaf in leaves.items()}


def test_recomputation_and_cuts_do_not_change_gradients(program):
    expected = gradients(program, False, 1)
    assert all(gradient is not None for gradient in expected.values())
    for recompute, segments in ((True, None), (True, 7), (False, None)):
        got = gradients(program, recompute, segments)
        for name, gradient in expected.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_gradients_of_shared_tables_are_the_sum_over_loops():
    """The gradient of one leaf for all loops is the sum of those of its copies, one for each loop."""
    shared, relaxed = prepared(loops=3), prepared(loops=3)
    group = "layers.0.gate+up"
    assert group in loop_groups(relaxed)
    widen(relaxed, group)
    one, each = gradients(shared, False), gradients(relaxed, False)
    for part in ("left", "right"):
        name = f"transform.layers_0_gate_up.{part}"
        assert each[name].shape[0] == 3 and one[name].shape[0] == 1
        torch.testing.assert_close(each[name].sum(0), one[name][0], rtol=1e-4, atol=1e-7)
        assert (each[name][0] - each[name][2]).abs().max() > 0
    for weight in ("gate", "up"):
        rows = [each[f"layers.0.{weight}.weight_loop{row}_clip"] for row in range(3)]
        torch.testing.assert_close(sum(rows), one[f"layers.0.{weight}.weight_clip"], rtol=1e-4, atol=1e-7)


class Looped(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16, bias=False)

    def forward(self, x):
        for _ in range(3):
            x = torch.tanh(self.layer(x))
        return x


def codes(ratio):
    """Four-bit integers whose gradient is that of `ratio` inside the range, none outside."""
    whole = ratio.detach().round().clamp(-8, 7)
    inside = (ratio.detach() <= 7) & (ratio.detach() >= -8)
    return torch.where(inside, ratio + (whole - ratio.detach()), whole)


def largest(rows):
    """The entry of largest magnitude in each row, which a signed scale follows."""
    return rows.gather(-1, rows.abs().argmax(-1, keepdim=True))


def test_gradients_are_those_of_a_model_written_by_hand():
    """W4A4 with dynamic scales, transform and clips, in plain PyTorch."""
    torch.manual_seed(0)
    model = Looped().eval()
    x = torch.randn(2, 5, 16)
    graph_module = prepared(model=model, example=(x,), data=[(torch.randn(2, 5, 16),)], adapters=False)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in learned_tensors(graph_module).items()}
    results, _ = Student(graph_module).run([x], leaves)
    results[0].square().sum().backward()

    hand = {name: tensor.clone().requires_grad_() for name, tensor in learned_tensors(graph_module).items()}
    left, right = (next(t for n, t in hand.items() if n.endswith(part))[0] for part in ("left", "right"))
    clips = next(tensor for name, tensor in hand.items() if name.startswith("activation_clip"))
    matrix = torch.kron(left, right)
    weight = model.layer.weight.detach() @ torch.linalg.inv(matrix).t()
    scale = largest(weight) * hand["layer.weight_clip"] / -8
    rounded = codes(weight / scale) * scale
    state = x
    for loop in range(3):
        moved = state @ matrix
        step = largest(moved) * clips[loop] / -8
        state = torch.tanh(F.linear(codes(moved / step) * step, rounded))
    torch.testing.assert_close(results[0], state, rtol=1e-4, atol=1e-5)
    state.square().sum().backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, hand[name].grad, rtol=1e-2, atol=1e-3, msg=name)


def test_gradients_by_loop_need_no_weights_by_loop():
    """Chains of one weight that are equal share integers; the gradients are those of separate weights."""
    relaxed = prepared(loops=3)
    widen(relaxed, *loop_groups(relaxed))
    found = []
    for equal_loops in (False, True):
        student = Student(relaxed, equal_loops=equal_loops)
        tables = {name: tensor for name, tensor in learned_tensors(relaxed).items() if name.startswith("transform")}
        leaves = {name: tensor.requires_grad_() for name, tensor in tables.items()}
        with torch.no_grad():
            known = student.prepare({})
        integers = {id(value[0]._codes) for value in known.values() if isinstance(value, tuple)}
        assert len(integers) == (7 if equal_loops else 21), "three loops of seven weights"
        results, _ = student.run([tokens(3)], leaves)
        results[0].square().mean().backward()
        found.append({name: leaf.grad for name, leaf in leaves.items()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("relax", [False, True], ids=["shared", "by loop"])
def test_a_weight_may_go_through_its_chain_some_rows_at_a_time(monkeypatch, relax):
    """With transforms and clip ratios; the last part has fewer rows than the others."""
    program = prepared(loops=3)
    if relax:
        widen(program, "layers.0.gate+up")
    whole = gradients(program, False)
    taken = []
    parts = weight_chain.WeightChain.parts
    monkeypatch.setattr(weight_chain.WeightChain, "parts", lambda *args: taken.append(parts(*args)) or taken[-1])
    monkeypatch.setattr(weight_chain, "_NUMBERS", 7 * 32)
    for name, gradient in gradients(program, False).items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-6)
    assert taken and all(len(found) > 2 for found in taken)


def test_latent_weights_get_the_gradient_that_autograd_gives_to_offsets():
    """Of a program whose weights lie anywhere between integers, some of them outside the range."""
    program = prepared(loops=3)
    names = [name for name in Student(program).tensors if name.endswith("_rounding")]
    torch.manual_seed(0)
    steps = {name: 0.6 * torch.randn(get_tensor(program, name).shape) for name in names}
    for name, value in steps.items():
        set_tensor(program, name, value)
    leaves = {name: value.clone().requires_grad_() for name, value in steps.items()}
    expected, _ = Student(program, learned=names).run([tokens(3)], leaves)
    expected[0].square().mean().backward()
    program = LatentWeights()(program).graph_module
    learnables = {item.name: item for item in find_learnables(program, frozenset({"rounding"}))}
    values = {name: item.current() for name, item in learnables.items()}
    results, _ = Student(program, learned=list(values)).run([tokens(3)], values)
    results[0].square().mean().backward()
    torch.testing.assert_close(results[0], expected[0], rtol=1e-5, atol=1e-5)
    assert len(names) == len(values) == 7
    for name, leaf in leaves.items():
        found, wanted = values[name.replace("_rounding", "_latent")].gradient.float(), leaf.grad
        assert 0 < wanted.count_nonzero() < wanted.numel()
        torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2 * wanted.abs().max().item(), msg=name)
        assert (found.sign() == wanted.sign()).float().mean() > 0.999, "nothing passes a clipped weight"
