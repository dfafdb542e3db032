"""Minutes become steps: the number follows from what a rehearsal measured, and stays the same after a kill."""

import json
import math
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import loopq_compile as lq
from loopq_compile.calibration.training import Training
from loopq_compile.capture.to_graph import capture
from loopq_compile.cli import app
from loopq_compile.graph.options import CalibrationOptions
from loopq_compile.graph.state import get_state
from loopq_compile.methods import get_pipeline
from loopq_compile.passes.learn.calibrate import Calibrate
from loopq_compile.passes.learn.calibrate_blocks import CalibrateBlocks
from loopq_compile.planning import budget
from loopq_compile.planning.budget import RESERVE, Budget, fit
from loopq_compile.planning.costs import Cost, Learning, Phase, Rehearsed
from loopq_compile.planning.rehearsal import Rehearsal
from tests.calibration.test_checkpoint import KilledError, killed_at
from tests.calibration.test_shares import torchrun
from tests.tiny import tiny_model, tokens

STEP = Learning(setup=10.0, ask=0.0, target=0, step=2.0, evaluation=0.0, memory=0)
"""A phase that takes 10 seconds, and 2 for every step."""
OPTIONS = CalibrationOptions(batch_rows=4)


def measured(*phases, learn=1000, **options):
    parts = (Cost("collect-ranges", 30.0, 0), *phases)
    return Rehearsed(parts, replace(OPTIONS, **options), learn=learn, held=1)


def minutes_for(seconds):
    """Just enough minutes for this many seconds."""
    return seconds * (1 + 1e-9) / 60 / (1 - RESERVE)


def test_what_is_left_of_the_minutes_becomes_steps():
    one = measured(Phase(Calibrate(), STEP))
    # 540 planned seconds: 100 were spent, the ranges take 30 and the start of learning 10, each step 2.
    assert fit(one, 10, spent=100.0).steps == 200
    assert fit(one, 10, spent=100.0).seconds == pytest.approx(540)
    assert fit(one, 20, spent=100.0).steps == 200 + 270
    two = measured(Phase(Calibrate(0.5), STEP), Phase(Calibrate(0.5), replace(STEP, step=6.0)))
    assert fit(two, 10, spent=100.0).steps == (540 - 100 - 30 - 20) // 4 == 97, "4 seconds a step, on average"


def test_evaluations_and_the_teacher_count():
    learning = Learning(setup=0.0, ask=3.0, target=0, step=2.0, evaluation=5.0, memory=0)
    found = measured(Phase(Calibrate(), learning), learn=20, evaluate_every=50)
    for steps in (1, 19, 20, 21, 50, 51, 99, 100, 101, 250):
        seconds = 30 + 2 * steps + 5 * (1 + math.ceil(steps / 50)) + 3 * (min(steps, 20) + 1)
        assert found.seconds(steps) == seconds
        assert fit(found, minutes_for(seconds), spent=0.0).steps == steps


def test_blocks_are_counted_as_well():
    found = measured(Phase(CalibrateBlocks(), STEP))
    assert fit(found, minutes_for(30 + 10 + 2 * 17), spent=0.0).steps == 17


def test_too_few_minutes_are_refused_with_the_least():
    found = measured(Phase(Calibrate(0.5), STEP), Phase(Calibrate(0.5), STEP))
    with pytest.raises(lq.LoopQError, match=r"With 2 steps, one for each phase.*Give at least 1.2;") as caught:
        fit(found, 1, spent=10.0)
    assert "minutes=1 are too few" in str(caught.value)
    assert fit(found, 1.2, spent=10.0).steps == 2, "64.8 seconds for 10 + 30 + 2 * 10 + 2 * 2"


def test_a_text_that_is_too_short_is_said_to_be():
    enough, short = measured(Phase(Calibrate(), STEP), learn=50), measured(Phase(Calibrate(), STEP), learn=20)
    assert (
        "they read the calibration text 4 times" in fit(enough, 10, 100.0).text
        and "short" not in fit(enough, 10, 100.0).text
    )
    assert "they read 20% of the calibration text" in fit(measured(Phase(Calibrate(), STEP)), 10, 100.0).text
    assert "200 steps of 4 samples fit into 10 minutes" in fit(short, 10, 100.0).text
    # 200 steps are 4 times 50 batches of 4 rows, and an eighth is held out.
    assert "text 10 times, so it is too short: give about 229 samples" in fit(short, 10, 100.0).text


def test_minutes_without_learning_are_refused():
    with pytest.raises(lq.LoopQError, match="finds nothing to learn"):
        fit(measured(Phase(Calibrate(), None)), 10, 0.0)
    with pytest.raises(lq.LoopQError, match="'las' learns nothing"):
        compiled(method="las", minutes=10)
    with pytest.raises(lq.LoopQError, match="steps=3 and minutes=10 exclude each other"):
        compiled(steps=3, minutes=10)
    for wrong in (0, -1, math.inf, "10"):
        with pytest.raises(lq.LoopQError, match="minutes must be a number above 0"):
            compiled(minutes=wrong)


def test_the_command_refuses_before_it_loads_a_model(tmp_path):
    done = CliRunner().invoke(app, ["compile", "no-such-model", "--out", str(tmp_path / "p"), "--minutes", "1", *LAS])
    assert done.exit_code == 1 and "learns nothing, so minutes=1 has no use" in " ".join(done.stderr.split())


LAS = ["--method", "las"]
DATA = [tokens(seed, 4) for seed in range(6)]
QUICK = {"scheme": "w4a8", "group_size": 16, "validation": 0.34, "evaluate_every": 2, "fused": "off"}


def compiled(**options):
    return lq.compile(tiny_model(2, 1), tokens(), calibration=DATA, **(QUICK | options))


@pytest.fixture
def five_steps(monkeypatch):
    """Every rehearsal leads to five steps, however fast the machine is."""
    monkeypatch.setattr(budget, "fit", lambda *_: Budget(5, 60.0, "5 steps"))


def test_a_real_rehearsal_gives_the_steps_for_its_own_prediction():
    options, scheme = CalibrationOptions(fused="off", validation=0.34), lq.Scheme.parse("w4a8", group_size=16)
    graph = capture(tiny_model(2, 1), tokens())
    found = Rehearsal(graph, scheme, get_pipeline("loopq"), DATA, options).run()
    assert len(found.phases) == 4 and found.seconds(400) == sum(cost.seconds for cost in found.costs())
    for steps in (40, 400):  # steps of phases are rounded: a few more may take as long
        seconds = found.seconds(steps)
        chosen = fit(found, minutes_for(seconds), spent=0.0).steps
        assert chosen >= steps and found.seconds(chosen) == pytest.approx(seconds, rel=1e-6)
        assert found.seconds(chosen + 1) > seconds


def test_a_budget_gives_what_its_steps_give(five_steps, capsys):
    """A rehearsal leaves no trace."""
    told, chosen = compiled(steps=5), compiled(minutes=30)
    assert capsys.readouterr().err.count("5 steps\n") == 1
    assert [entry.notes for entry in chosen.log if entry.pass_name == "budget"] == [["5 steps"]]
    options = get_state(chosen.graph_module).options
    assert options.steps == 5 and options.minutes is None
    ours, theirs = told.graph_module.state_dict(), chosen.graph_module.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_killed_calibration_keeps_its_steps(five_steps, tmp_path, monkeypatch):
    options = {"checkpoint": tmp_path, "checkpoint_every": 1, "minutes": 30, "method": "flatquant-e2e"}
    with monkeypatch.context() as patch:
        killed_at(patch, Training, "validate", 6)  # two were rehearsed for each phase
        with pytest.raises(KilledError):
            compiled(**options)
    assert json.loads((tmp_path / "budget.json").read_text())["steps"] == 5
    monkeypatch.setattr(budget, "fit", lambda *_: pytest.fail("rehearsed again"))
    again = compiled(**options)
    whole = compiled(steps=5, method="flatquant-e2e")
    ours, theirs = again.graph_module.state_dict(), whole.graph_module.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(lq.LoopQError, match=r"budget\.json belongs to another calibration.*minutes differ"):
        compiled(**options | {"minutes": 31})
    (tmp_path / "budget.json").write_text("{")
    with pytest.raises(lq.LoopQError, match=r"budget\.json is damaged"):
        compiled(**options)


def test_processes_rehearse_their_share():
    options = CalibrationOptions(batch_rows=8, statistics_tokens=1000)
    mine, batches = budget.share(options, DATA, rank=1, size=2)
    assert mine == replace(options, batch_rows=4, statistics_tokens=500)
    assert len(batches) == 3 and all(torch.equal(*pair) for pair in zip(batches, DATA[1::2], strict=True))
    assert budget.share(options, DATA, 0, 1) == (options, DATA)


@pytest.mark.nightly
def test_two_processes_take_the_steps_of_the_first():
    """Each of them measures something else."""
    script = """
import os
import loopq_compile as lq
from loopq_compile.graph.state import get_state
from loopq_compile.planning import budget
from tests.planning.test_budget import compiled
rank = int(os.environ["RANK"])
budget.fit = lambda *_: budget.Budget(3 + 2 * rank, 60.0, "chosen")
print(get_state(compiled(minutes=30, method="flatquant-e2e").graph_module).options.steps)
def refuse(*_):
    raise lq.LoopQError("too few")
if rank == 0:
    budget.fit = refuse
try:
    compiled(minutes=30, method="flatquant-e2e")
except lq.LoopQError as error:
    print(error)
"""
    assert sorted(torchrun("-c", script).split("\n")) == ["", "3", "3", "too few", "too few"]
