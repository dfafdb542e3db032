"""`select-transforms` and the widening that it uses."""

import pytest
import torch
from torch import Tensor, nn

from loopq_compile.errors import InternalError
from loopq_compile.graph.options import CalibrationOptions
from loopq_compile.graph.state import get_state, get_tensor, set_tensor
from loopq_compile.operators import ops
from loopq_compile.passes.learn.select_transforms import SelectTransforms, _score, sharing_gaps
from loopq_compile.passes.transforms.widen import loop_groups, widen
from tests.calibration.tools import prepared
from tests.tiny import tokens

GROUPS = 4
"""Groups of the tiny model: attention in and out, MLP in and out."""


class Uneven(nn.Module):
    """Channels that are large for `uneven` in one loop are small in the next; `even` sees the same in every loop."""

    def __init__(self, loops: int = 3) -> None:
        super().__init__()
        self.uneven, self.even = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        self.out = nn.Linear(16, 8)
        gains = torch.ones(loops, 16)
        for loop in range(loops):
            gains[loop, 4 * loop : 4 * loop + 4] = 30.0
        self.register_buffer("gains", gains)

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for gain in self.gains:
            first = torch.tanh(self.uneven((x + 0.001 * total) * gain))
            total = total + first + torch.tanh(self.even(x + 0.001 * first))
        return self.out(total)


@pytest.fixture(scope="module")
def uneven():
    torch.manual_seed(0)
    data = [(torch.randn(4, 12, 16),) for _ in range(4)]
    model = Uneven().eval()
    return prepared(model=model, example=(torch.randn(2, 5, 16),), data=data, adapters=False, rounding=False)


def test_the_group_whose_loops_want_different_transforms_has_the_highest_score(uneven):
    scores = sharing_gaps(uneven, list(loop_groups(uneven)))
    assert set(scores) == {"uneven", "even"}
    assert scores["uneven"] > 1.5 * scores["even"] > 0


def test_the_score_by_hand():
    """Two loops: means 1 and 3 (variance 1), squares 2 everywhere; the damping is a tenth of that."""
    mean = torch.tensor([[1.0, 1.0], [3.0, 1.0]])
    assert _score(mean, torch.tensor([2.0, 2.0])) == pytest.approx((1 / 2.2 + 0) / 2)
    assert _score(torch.zeros(2, 3), torch.zeros(3)) == 0.0


def test_loop_groups_are_those_with_shared_weights():
    graph_module = prepared(loops=3)
    groups = loop_groups(graph_module)
    assert len(groups) == GROUPS and set(groups.values()) == {3}
    widen(graph_module, "layers.0.down")
    assert "layers.0.down" not in loop_groups(graph_module) and len(loop_groups(graph_module)) == GROUPS - 1


def test_widening_changes_no_result():
    shared, relaxed = prepared(loops=3), prepared(loops=3)
    for group in loop_groups(shared):
        widen(relaxed, group)
    relaxed.graph.lint()
    relaxed.recompile()
    with torch.no_grad():
        for first, second in zip(shared(tokens(4)), relaxed(tokens(4)), strict=True):
            assert first.equal(second)


def test_a_widened_group_has_rows_and_weights_of_its_own():
    graph_module = prepared(loops=3)
    before = {name for name, _ in graph_module.named_buffers()}
    widen(graph_module, "layers.0.down")
    assert get_tensor(graph_module, "transform.layers_0_down.left").shape[0] == 3
    assert get_tensor(graph_module, "transform.layers_0_gate_up.left").shape[0] == 1
    added = {name for name, _ in graph_module.named_buffers()} - before
    wanted = {f"layers.0.down.weight_loop{row}_{part}" for row in range(3) for part in ("clip", "rounding")}
    assert added == wanted
    weights = {
        node.args[1]
        for node in graph_module.graph.nodes
        if node.meta.get("loopq_site") == "layers.0.down" and node.target is torch.ops.aten.linear.default
    }
    assert len(weights) == 3
    kept = [node for node in graph_module.graph.nodes if node.meta.get("loopq_learn") == "rounding"]
    assert "layers.0.down.weight_rounding" not in {node.target for node in kept}


def test_what_is_learned_in_one_loop_leaves_the_others():
    graph_module = prepared(loops=2)
    widen(graph_module, "layers.0.down")
    graph_module.recompile()
    with torch.no_grad():
        before = graph_module(tokens(4))[1]
        name = "layers.0.down.weight_loop1_rounding"
        table = get_tensor(graph_module, name)
        steps = 20 * torch.randn(table.shape, generator=torch.Generator().manual_seed(0))
        set_tensor(graph_module, name, steps.to(table.dtype))
        after = graph_module(tokens(4))[1]
    assert after[..., 0].equal(before[..., 0]) and not after[..., 1].equal(before[..., 1])


def selected(graph_module):
    return get_state(graph_module).results["slt"]["selected"]


@pytest.mark.parametrize(("budget", "count"), [(0.05, 2), (0.75, 3), (0.0, 0)])
def test_the_budget_is_kept(budget, count):
    rounds = [SelectTransforms(number, 2) for number in range(3)]
    graph_module = prepared(*rounds, selection_budget=budget)
    assert len(selected(graph_module)) == len(set(selected(graph_module))) == count
    repeated = [
        node for node in graph_module.graph.nodes if node.op == "get_attr" and "_loop0_clip" in str(node.target)
    ]
    assert bool(repeated) == bool(count)


def test_selection_is_progressive_and_takes_the_best():
    graph_module = prepared(SelectTransforms(0, 2), SelectTransforms(1, 2))
    found = get_state(graph_module).results["slt"]
    assert found["candidates"] == GROUPS and len(found["scores"]) == 2
    for scores, group in zip(found["scores"], found["selected"], strict=True):
        assert group == max(scores, key=scores.get)
    assert found["selected"][0] not in found["scores"][1]
    assert len(found["scores"][1]) == GROUPS - 1


def test_nothing_to_select():
    graph_module = prepared(SelectTransforms(), transforms=False)
    assert selected(graph_module) == [] and not get_state(graph_module).log[-1].modified
    model = nn.Sequential(nn.Embedding(64, 16), nn.Linear(16, 16)).eval()
    graph_module = prepared(SelectTransforms(), model=model, data=[tokens(1)])
    assert selected(graph_module) == []


def test_it_needs_a_teacher():
    graph_module = prepared()
    state = get_state(graph_module)
    state.run.teacher, state.options = None, CalibrationOptions()
    with pytest.raises(InternalError, match="select-transforms needs"):
        SelectTransforms()(graph_module)
    assert any(node.target is ops.kronecker.default for node in graph_module.graph.nodes)
