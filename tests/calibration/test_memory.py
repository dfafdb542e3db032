"""What calibration keeps while it runs through many loops. `python -m tests.calibration.memory` measures processes."""

import torch

from loopq_compile.calibration import student as students
from loopq_compile.graph.state import get_state
from loopq_compile.passes.learn.calibrate import Calibrate
from tests.calibration.memory import saved_bytes
from tests.calibration.tools import prepared
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
