"""`calibrate`: what it learns, what it reports, and what it does not change."""

import json

import pytest
import torch

import loopq_compile as lq
from loopq_compile.calibration.learnable import RATES
from loopq_compile.errors import InternalError
from loopq_compile.graph.state import get_state, get_tensor
from loopq_compile.passes.learn.calibrate import Calibrate, find_learnables, fingerprint
from tests.calibration.tools import learned_tensors, prepared

KINDS = {"transform", "clip", "weight_clip", "adapter"}


@pytest.fixture(scope="module")
def learned():
    """A low-bit program before and after a short calibration."""
    options = {"scheme": "w3a3", "loops": 2, "evaluate_every": 5}
    return prepared(**options), prepared(Calibrate(), **options, steps=100)


def test_the_program_comes_nearer_to_its_teacher(learned):
    state = get_state(learned[1])
    (report,) = state.results["calibration"]
    assert report["best"] < 0.9 * report["start"] and report["skipped"] == report["refused"] == 0
    assert report["steps"] == 100 and report["tokens"] == 100 * 4 * 16 and report["phase"] == 0
    assert state.log[-1].modified and "100 steps, 6,400 tokens: divergence from the teacher" in state.log[-1].notes[0]
    json.dumps(report)


def test_everything_that_may_change_is_learned_and_counted(learned):
    before, after = map(learned_tensors, learned)
    (report,) = get_state(learned[1]).results["calibration"]
    assert set(report["learned"]) == KINDS
    assert sum(report["learned"].values()) == sum(tensor.numel() for tensor in before.values())
    unchanged = [name for name, tensor in before.items() if tensor.equal(after[name])]
    assert not unchanged


def test_graph_types_and_shapes_stay(learned):
    before, after = learned
    assert before.code == after.code
    for name, tensor in learned_tensors(before).items():
        other = get_tensor(after, name)
        assert other.shape == tensor.shape and other.dtype == get_tensor(before, name).dtype and not other.requires_grad


def test_clip_ratios_of_activations_stay_ratios(learned):
    tensors = learned_tensors(learned[1])
    clips = [tensor for name, tensor in tensors.items() if name.startswith("activation_clip")]
    assert clips and all(tensor.min() > 0 and tensor.max() <= 1 for tensor in clips)
    assert all(tensor.min() > 0 for name, tensor in tensors.items() if name.endswith("_clip"))


def test_the_tensors_of_the_captured_model_are_not_touched(learned):
    from tests.tiny import tiny_model

    fresh = type(tiny_model(2))
    torch.manual_seed(0)
    for (name, tensor), (_, wanted) in zip(
        tiny_model(2).named_parameters(), fresh(2, 1).named_parameters(), strict=True
    ):
        assert tensor.equal(wanted), name


@pytest.mark.parametrize("kinds", [("clip",), ("adapter",), ("transform", "weight_clip")])
def test_kinds_choose_what_is_learned(kinds):
    graph_module = prepared(Calibrate(kinds=kinds), steps=1)
    (report,) = get_state(graph_module).results["calibration"]
    assert set(report["learned"]) == set(kinds)


def test_rounding_is_learned_of_latent_weights():
    before = prepared(rounding=True)
    after = prepared(Calibrate(kinds=("rounding", "clip")), rounding=True, steps=2)
    (report,) = get_state(after).results["calibration"]
    assert set(report["learned"]) == {"rounding", "clip"}
    latent = [name for name in learned_tensors(before) if name.endswith("_latent")]
    assert len(latent) == 7
    for name in latent:
        start, end = get_tensor(before, name), get_tensor(after, name)
        assert end.dtype == torch.int16 and not start.equal(end)
    with pytest.raises(lq.LoopQError, match=r"rounding only of latent weights: put LatentWeights\(\) in front of it"):
        prepared(Calibrate(kinds=("rounding",)))


def test_rotations_are_learned_as_rotations():
    graph_module = prepared(Calibrate(kinds=("orthogonal",)), learn="orthogonal", scheme="w3a3", steps=3)
    (report,) = get_state(graph_module).results["calibration"]
    assert set(report["learned"]) == {"orthogonal"}
    for name, tensor in learned_tensors(graph_module).items():
        if name.endswith((".left", ".right")):
            eye = torch.eye(tensor.shape[-1])
            assert (tensor @ tensor.mT - eye).abs().max() < 1e-4, name


def test_static_scales_are_learned_as_ranges():
    graph_module = prepared(activation="static")
    kinds = {item.kind for item in find_learnables(graph_module, frozenset(RATES))}
    assert "range" in kinds and "clip" not in kinds


def test_without_the_trajectory_predictions_alone_count():
    graph_module = prepared(Calibrate(trajectory=False), steps=2)
    curve = get_state(graph_module).results["calibration"][0]["curve"]
    assert all(row["trajectory"] == row["transition"] == 0 for row in curve)
    curve = get_state(prepared(Calibrate(), steps=2)).results["calibration"][0]["curve"]
    assert curve[-1]["trajectory"] > 0 and curve[-1]["transition"] > 0


def test_phases_share_the_steps():
    graph_module = prepared(Calibrate(share=0.25), Calibrate(share=0.75), steps=8)
    reports = get_state(graph_module).results["calibration"]
    assert [report["steps"] for report in reports] == [2, 6] and [report["phase"] for report in reports] == [0, 1]
    assert reports[1]["start"] == pytest.approx(reports[0]["best"], rel=1e-3), "the second begins where the first ended"


def test_half_of_the_products_in_bfloat16():
    graph_module = prepared(Calibrate(), steps=2, precision="bfloat16")
    assert get_state(graph_module).results["calibration"][0]["skipped"] == 0
    assert all(tensor.dtype == torch.float32 for tensor in learned_tensors(graph_module).values())


def test_nothing_to_learn_nothing_to_do():
    graph_module = prepared(Calibrate(kinds=("orthogonal",)))
    state = get_state(graph_module)
    assert not state.log[-1].modified and not state.results.get("calibration")


def test_it_needs_a_teacher_and_data():
    graph_module = prepared()
    get_state(graph_module).run.calibration = None
    with pytest.raises(lq.LoopQError, match="method='test' learns from calibration data"):
        Calibrate()(graph_module)
    get_state(graph_module).run.teacher = None
    with pytest.raises(InternalError, match="as a teacher"):
        Calibrate()(graph_module)


def test_the_fingerprint_tells_calibrations_apart():
    state = get_state(prepared())
    tensors, batches = {"x": torch.ones(2), "scalar": torch.tensor(1.0)}, [[torch.arange(3)]]
    first = fingerprint(tensors, state, batches, ["x"], 5)
    assert first == fingerprint(dict(tensors), state, batches, ["x"], 5)
    others = [
        fingerprint({**tensors, "scalar": torch.tensor(2.0)}, state, batches, ["x"], 5),
        fingerprint(tensors, state, [[torch.arange(4)]], ["x"], 5),
        fingerprint(tensors, state, batches, [], 5),
        fingerprint(tensors, state, batches, ["x"], 6),
    ]
    assert first not in others and len(set(others)) == 4


def test_later_phases_remember_what_the_teacher_said(monkeypatch):
    from loopq_compile.calibration.teacher import Teacher

    asked = []
    ask = Teacher.ask
    monkeypatch.setattr(Teacher, "ask", lambda self, inputs: asked.append(1) or ask(self, inputs))
    graph_module = prepared(Calibrate(0.5), Calibrate(0.5), Calibrate(0.5, trajectory=False), steps=12, validation=0.5)
    assert len(get_state(graph_module).results["calibration"]) == 3
    assert len(asked) == 6 + 6, "once for every batch, and once more where no states are looked at"
