"""`calibrate-blocks`: learns layer by layer from the model's own inputs and outputs."""

import pytest
import torch
from torch import nn

import loopq_compile as lq
from loopq_compile.calibration import blockwise
from loopq_compile.errors import InternalError
from loopq_compile.graph.state import get_state
from loopq_compile.passes.learn.calibrate_blocks import CalibrateBlocks
from tests.calibration.tools import assert_same, largest_difference, learned_tensors, prepared
from tests.tiny import tokens

OPTIONS = {"steps": 4, "evaluate_every": 2, "adapters": False, "learning_rate": 3.3}


@pytest.fixture(scope="module")
def learned():
    """A low-bit program before and after."""
    before = prepared(scheme="w3a3", layers=2, **OPTIONS)
    after = prepared(CalibrateBlocks(), scheme="w3a3", layers=2, **{**OPTIONS, "steps": 12, "evaluate_every": 3})
    return before, after


def test_every_block_gets_better_and_says_so(learned):
    state = get_state(learned[1])
    results = state.results["blocks"]
    assert [len(result["sites"]) for result in results] == [7, 7] and [r["calls"] for r in results] == [2, 2]
    assert all(result["best"] < result["start"] for result in results)
    assert state.log[-1].modified and "2 blocks (4 calls), 24 steps: mean relative error" in state.log[-1].notes[0]


def test_transforms_and_clip_ratios_are_learned_and_rounding_is_not(learned):
    before, after = map(learned_tensors, learned)
    changed = {name for name, tensor in before.items() if not tensor.equal(after[name])}
    assert any(name.startswith("transform.") for name in changed)
    assert any(name.startswith("activation_clip.") for name in changed)
    assert any(name.endswith("_clip") for name in changed)
    assert not any(name.endswith("_rounding") for name in changed)


def test_the_graph_stays_as_it_was(learned):
    before, after = learned
    assert before.code == after.code


def test_kinds_choose_what_is_learned():
    graph_module = prepared(CalibrateBlocks(kinds=("clip",)), scheme="w3a3", **OPTIONS)
    (result,) = get_state(graph_module).results["blocks"]
    assert set(result["learned"]) == {"clip"}


def test_static_ranges_are_learned():
    graph_module = prepared(CalibrateBlocks(), activation="static", **OPTIONS)
    (result,) = get_state(graph_module).results["blocks"]
    assert "range" in result["learned"] and "clip" not in result["learned"]


def test_nothing_to_learn_nothing_to_do():
    graph_module = prepared(CalibrateBlocks(kinds=("adapter",)), **OPTIONS)
    state = get_state(graph_module)
    assert not state.log[-1].modified and "blocks" not in state.results


def test_an_absurd_rate_changes_nothing():
    before = learned_tensors(prepared(scheme="w8a8", **OPTIONS))
    graph_module = prepared(CalibrateBlocks(), scheme="w8a8", **{**OPTIONS, "learning_rate": 2000.0})
    assert_same(learned_tensors(graph_module), before)
    assert not get_state(graph_module).log[-1].modified


def test_large_models_are_recorded_block_by_block(monkeypatch):
    whole = learned_tensors(prepared(CalibrateBlocks(), layers=2, **OPTIONS))
    monkeypatch.setattr(blockwise, "KEPT_BYTES", 0)
    parts = prepared(CalibrateBlocks(), layers=2, **OPTIONS)
    assert len(get_state(parts).results["blocks"]) == 2
    assert largest_difference(learned_tensors(parts), whole) < 0.1, "as far as bfloat16 goes"


def test_it_needs_a_teacher_and_data():
    graph_module = prepared(**OPTIONS)
    get_state(graph_module).run.calibration = None
    with pytest.raises(lq.LoopQError, match="learns from calibration data"):
        CalibrateBlocks()(graph_module)
    get_state(graph_module).run.teacher = None
    with pytest.raises(InternalError, match="as a teacher"):
        CalibrateBlocks()(graph_module)


def test_a_model_that_overflows_is_refused():
    model = nn.Sequential(nn.Embedding(64, 16), nn.Linear(16, 16), nn.Linear(16, 16)).eval()
    data = [tokens(seed, 4, 6) for seed in range(4)]
    graph_module = prepared(model=model, data=data, **OPTIONS)
    teacher = get_state(graph_module).run.teacher
    weight = next(node for node in teacher.graph.nodes if node.op == "get_attr")
    from loopq_compile.graph.state import get_tensor, set_tensor

    broken = get_tensor(teacher, weight.target).detach() * torch.inf
    owner, _, leaf = str(weight.target).rpartition(".")
    delattr(teacher.get_submodule(owner), leaf)
    set_tensor(teacher, str(weight.target), broken)
    with pytest.raises(lq.LoopQError, match=r"batch 0: node '.*' of the model in full precision is NaN"):
        CalibrateBlocks()(graph_module)
