"""What calibration keeps while it runs through many loops. `python -m tests.calibration.memory` measures processes."""

import gc

import pytest
import torch

import loopq_compile as lq
from loopq_compile.calibration import best_state
from loopq_compile.calibration import student as students
from loopq_compile.calibration.steps import Steps
from loopq_compile.debugging import Snapshot
from loopq_compile.graph.state import get_state, get_tensor
from loopq_compile.operators.latent import LATENT
from loopq_compile.passes.learn.calibrate import Calibrate
from tests.calibration.memory import saved_bytes
from tests.calibration.tools import learned_tensors, prepared
from tests.tiny import tokens

ROWS, LENGTH, WIDTH = 4, 61, 64
STATE = ROWS * LENGTH * WIDTH * 4
"""Bytes of one state."""


def by_loops(programs, recompute):
    return [saved_bytes(program, tokens(0, ROWS, LENGTH), recompute) for program in programs]


def test_with_recomputation_memory_grows_by_the_states_between_segments_alone():
    programs = [prepared(loops=loops, transforms=False, data=[tokens(0)]) for loops in (2, 4, 8)]
    kept = by_loops(programs, True)
    growth = [(kept[1] - kept[0]) / 2, (kept[2] - kept[1]) / 4]
    assert all(each <= 2.5 * STATE for each in growth), "for each loop about a state"
    without = by_loops(programs, False)
    assert (without[2] - without[1]) / 4 > 10 * growth[1], "without it, all that a layer computes"


def test_both_ways_learn_the_same():
    on, off = (get_state(prepared(Calibrate(), recompute=way)).results["calibration"] for way in ("on", "off"))
    assert torch.allclose(torch.tensor(on[0]["best"]), torch.tensor(off[0]["best"]), rtol=1e-4)


def test_auto_decides_by_size(monkeypatch):
    from loopq_compile.passes.learn import calibrate

    seen = []
    original = students.Student.__init__

    def spy(self, graph_module, watched=(), recompute=True, **options):
        seen.append(recompute)
        original(self, graph_module, watched, recompute, **options)

    monkeypatch.setattr(students.Student, "__init__", spy)
    for limit, expected in ((1 << 40, False), (1, True)):
        monkeypatch.setattr(calibrate, "KEPT_BYTES", limit)
        seen.clear()
        prepared(Calibrate(), steps=1, recompute="auto")
        assert seen[0] is expected


def test_each_weight_whose_rounding_is_learned_exists_once(monkeypatch):
    monkeypatch.setattr(best_state, "MEMORY_BYTES", 0)
    counts, step = [], Steps.step

    def counting(self):
        parts = step(self)
        waiting = {tensor.data_ptr() for tensor in (*self.best.values(), *spare.values())}
        found = [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and x.dtype == LATENT and x.numel() > 1]
        counts.append(len({x.data_ptr() for x in found if x.stride() != (0, 0)} - waiting))
        return parts

    spare, replace = {}, Snapshot.replace

    def watching(self, tensors):
        spare.update(tensors)
        replace(self, tensors)

    monkeypatch.setattr(Snapshot, "replace", watching)
    monkeypatch.setattr(Steps, "step", counting)
    prepared(Calibrate(kinds=("rounding", "clip")), rounding=True, steps=4)
    assert counts == [7] * 4, "whoever is kept from an earlier step, or for the case of an error, waits on disk"


def test_after_an_error_the_weights_from_before_the_pass_come_back(monkeypatch):
    monkeypatch.setattr(best_state, "MEMORY_BYTES", 0)
    step = Steps.step

    def failing(self):
        if self.report.steps == 2:
            raise lq.LoopQError("the third step")
        return step(self)

    monkeypatch.setattr(Steps, "step", failing)
    before = prepared(rounding=True)
    with pytest.raises(lq.LoopQError, match="the third step") as caught:
        prepared(Calibrate(kinds=("rounding",)), rounding=True, steps=4)
    found = caught.value.failure.graph_module
    names = [name for name in learned_tensors(before) if name.endswith("_latent")]
    assert len(names) == 7
    assert all(get_tensor(found, name).equal(get_tensor(before, name)) for name in names)
