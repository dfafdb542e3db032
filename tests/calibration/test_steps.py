"""What is kept, when calibration stops, and what happens when numbers go wrong."""

import math

import pytest
import torch

import loopq_compile as lq
from loopq_compile.calibration.learnable import Learnable
from loopq_compile.calibration.objective import LossParts
from loopq_compile.calibration.steps import Plan, Steps
from loopq_compile.graph.options import CalibrationOptions
from loopq_compile.graph.state import get_state
from loopq_compile.passes.learn.calibrate import Calibrate, guard
from tests.calibration.tools import assert_same, learned_tensors, prepared


class Parabola(Steps):
    """`|x - goal|²` with a matrix `x`; every batch is the same."""

    def __init__(self, start, goal=0.0, name="x", loss=None, **options):
        self.goal, self.loss, self.start = goal, loss, start.clone()
        settings = CalibrationOptions(**{"evaluate_every": 1} | options)
        learnables = [Learnable.of(name, "transform", start)]
        super().__init__(Plan(learnables, [[torch.zeros(2, 3)]] * 4, settings, settings.steps, guard))

    def backward(self, number):
        x = self.learnables[0].value()
        total = (x - self.goal).square().sum() if self.loss is None else self.loss(x, self.report.steps)
        total.backward()
        zero = torch.zeros(())
        return LossParts(total, total.detach(), zero, zero)

    def validate(self, values):
        return float((values.get("x", self.start) - self.goal).square().sum())


def test_it_goes_downhill_and_reports_it():
    steps = Parabola(torch.full((2,), 0.1), steps=40)
    learned = steps.run("")
    report = steps.report
    assert report.best < report.start and learned["x"].abs().max() < 0.1
    assert report.steps == 40 and report.tokens == 40 * 6
    assert [row["step"] for row in report.curve] == list(range(41))
    assert report.best == min(row["validation"] for row in report.curve)


def test_never_worse_than_the_start():
    steps = Parabola(torch.full((2,), 1e-6), steps=20, learning_rate=1e4)
    assert steps.run("") == {}, "nothing to change"
    assert steps.report.best == steps.report.start and steps.report.best_step == 0


def test_the_best_state_is_kept_and_not_the_last():
    steps = Parabola(torch.full((2,), 0.05), steps=30, learning_rate=15.0)
    learned = steps.run("")
    assert float(learned["x"].square().sum()) == pytest.approx(steps.report.best, rel=1e-4)
    assert steps.report.best < steps.report.curve[-1]["validation"]


def test_it_stops_when_nothing_improves():
    steps = Parabola(torch.zeros(2), steps=100, patience=3, learning_rate=10.0, loss=lambda x, _: x.sum())
    steps.run("")
    assert steps.report.steps == 3, "three evaluations without improvement"


def test_a_loss_that_is_not_finite_changes_nothing_and_ends_with_an_error():
    steps = Parabola(torch.ones(2), steps=50, patience=50, loss=lambda x, _: (x * math.nan).sum())
    with pytest.raises(lq.LoopQError, match=r"not finite in 10 steps in a row \(step 10\). Lower learning_rate"):
        steps.run("")
    assert steps.learnables[0].raw.tolist() == [1.0, 1.0]


def test_single_steps_without_a_finite_loss_are_skipped():
    def loss(x, step):
        return (x * (math.inf if step % 3 == 1 else 1.0)).square().sum()

    steps = Parabola(torch.full((2,), 0.1), steps=12, loss=loss)
    steps.run("")
    assert steps.report.skipped == 4 and steps.report.steps == 12
    assert steps.report.best < steps.report.start


def test_a_transform_that_cannot_be_inverted_counts_as_a_failure():
    def loss(x, _):
        return torch.linalg.inv(x * 0).sum()

    steps = Parabola(torch.eye(2), steps=50, patience=50, loss=loss)
    with pytest.raises(lq.LoopQError, match="not finite in 10 steps"):
        steps.run("")


def test_singular_transforms_are_never_kept():
    """The loss falls towards a singular matrix; what is kept can be inverted."""
    start = torch.eye(2).unsqueeze(0)
    steps = Parabola(start, torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]), "t.left", steps=40, learning_rate=100.0)
    steps.validate = lambda values: float((values.get("t.left", start) - steps.goal).square().sum())
    learned = steps.run("")
    kept = learned.get("t.left", start)
    assert torch.linalg.cond(kept).max() <= 1e4
    steps = Parabola(start, name="t.left", steps=1)
    assert "condition number" in steps.guard({"t.left": torch.diag(torch.tensor([1.0, 1e-6])).unsqueeze(0)})
    assert "not finite" in steps.guard({"t.left": torch.full((1, 2, 2), math.nan)})
    assert steps.guard({"t.left": start, "clip": torch.zeros(2, 2)}) is None


def test_a_start_that_the_guard_would_refuse_is_still_the_start():
    start = torch.diag(torch.tensor([1.0, 1e-6])).unsqueeze(0)
    steps = Parabola(start, start, "t.left", steps=3)
    steps.validate = lambda values: 1.0 if values else 0.5
    assert steps.run("") == {} and steps.report.start == 0.5


def test_a_calibration_with_an_absurd_rate_returns_the_program_it_was_given():
    before = learned_tensors(prepared(scheme="w8a8"))
    graph_module = prepared(Calibrate(), steps=6, learning_rate=300.0, scheme="w8a8")
    assert_same(learned_tensors(graph_module), before)
    (report,) = get_state(graph_module).results["calibration"]
    assert report["best_step"] == 0 and report["best"] == report["start"]


def test_gradients_are_clipped():
    def loss(x, _):
        return (x * 1e6).sum()

    steps = Parabola(torch.zeros(2), steps=1, gradient_clip=1e-3, loss=loss)
    seen = []
    original = steps.optimizer.step
    steps.optimizer.step = lambda: (seen.append(steps.learnables[0].raw.grad.norm()), original())
    steps.run("")
    assert float(seen[0]) == pytest.approx(1e-3, rel=1e-3)
