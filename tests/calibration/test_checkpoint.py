"""A killed calibration continues with the same numbers; a damaged file, or one of another calibration, is refused."""

import os

import pytest
import torch

import loopq_compile as lq
from loopq_compile.calibration import checkpoint
from loopq_compile.calibration.blockwise import BlockTraining
from loopq_compile.calibration.training import Training
from loopq_compile.graph.state import get_state
from loopq_compile.passes.learn.calibrate import Calibrate
from loopq_compile.passes.learn.calibrate_blocks import CalibrateBlocks
from tests.calibration.tools import assert_same, learned_tensors, prepared
from tests.tiny import tokens

OPTIONS = {"steps": 6, "evaluate_every": 2, "checkpoint_every": 2, "refresh": 3}


class KilledError(BaseException):
    """Simulates a kill: nothing in between catches it."""


def killed_at(monkeypatch, cls, method, call):
    """The `call`-th call of a method does not return."""
    original, calls = getattr(cls, method), []

    def wrapped(self, *args):
        calls.append(1)
        if len(calls) == call:
            raise KilledError
        return original(self, *args)

    monkeypatch.setattr(cls, method, wrapped)


@pytest.fixture(scope="module")
def whole():
    """What an undisturbed calibration learns, and its report."""
    graph_module = prepared(Calibrate(), **OPTIONS)
    return learned_tensors(graph_module), get_state(graph_module).results["calibration"]


@pytest.mark.parametrize(("method", "call"), [("backward", 2), ("backward", 6), ("validate", 3), ("_refresh", 2)])
def test_a_killed_calibration_goes_on_with_the_same_numbers(tmp_path, monkeypatch, whole, method, call):
    with monkeypatch.context() as patch:
        killed_at(patch, Training, method, call)
        with pytest.raises(KilledError):
            prepared(Calibrate(), **OPTIONS, checkpoint=tmp_path)
    graph_module = prepared(Calibrate(), **OPTIONS, checkpoint=tmp_path)
    assert_same(learned_tensors(graph_module), whole[0])
    assert get_state(graph_module).results["calibration"] == whole[1], "the report, too"


def test_a_finished_calibration_is_not_repeated(tmp_path, monkeypatch, whole):
    prepared(Calibrate(), **OPTIONS, checkpoint=tmp_path)
    killed_at(monkeypatch, Training, "backward", 1)
    assert_same(learned_tensors(prepared(Calibrate(), **OPTIONS, checkpoint=tmp_path)), whole[0])


def test_a_kill_in_the_second_phase_keeps_the_first(tmp_path, monkeypatch):
    phases = (Calibrate(share=0.5), Calibrate(share=0.5))
    whole = learned_tensors(prepared(*phases, **OPTIONS))
    with monkeypatch.context() as patch:
        killed_at(patch, Training, "backward", 5)
        with pytest.raises(KilledError):
            prepared(*phases, **OPTIONS, checkpoint=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir())[0] == "phase-0.safetensors"
    assert_same(learned_tensors(prepared(*phases, **OPTIONS, checkpoint=tmp_path)), whole)


def test_blocks_go_on_where_they_were(tmp_path, monkeypatch):
    options = {**OPTIONS, "steps": 4, "layers": 2}
    whole = learned_tensors(prepared(CalibrateBlocks(), **options))
    with monkeypatch.context() as patch:
        killed_at(patch, BlockTraining, "backward", 7)
        with pytest.raises(KilledError):
            prepared(CalibrateBlocks(), **options, checkpoint=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"block-0.safetensors", "block-1.safetensors"}
    assert_same(learned_tensors(prepared(CalibrateBlocks(), **options, checkpoint=tmp_path)), whole)


@pytest.mark.parametrize("damage", ["cut", "flip", "text"])
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    prepared(Calibrate(), **OPTIONS, checkpoint=tmp_path)
    path = tmp_path / "phase-0.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-9] ^= 64
    path.write_bytes({"cut": data[: len(data) // 2], "flip": data, "text": b"not a checkpoint"}[damage])
    with pytest.raises(lq.LoopQError, match=r"phase-0.safetensors is damaged .*delete it to start again"):
        prepared(Calibrate(), **OPTIONS, checkpoint=tmp_path)


@pytest.mark.parametrize("change", [{"seed": 1}, {"scheme": "w3a4"}, {"data": "other"}])
def test_the_checkpoint_of_another_calibration_is_refused(tmp_path, change):
    prepared(Calibrate(), **OPTIONS, checkpoint=tmp_path)
    if "data" in change:
        change = {"data": [tokens(seed + 50, 4) for seed in range(6)]}
    with pytest.raises(lq.LoopQError, match="belongs to another calibration"):
        prepared(Calibrate(), **{**OPTIONS, "checkpoint": tmp_path, **change})


def test_how_often_it_is_saved_does_not_matter(tmp_path, whole):
    prepared(Calibrate(), **OPTIONS, checkpoint=tmp_path)
    again = prepared(Calibrate(), **{**OPTIONS, "checkpoint_every": 1}, checkpoint=tmp_path)
    assert_same(learned_tensors(again), whole[0])


def test_writing_leaves_the_old_file_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file.safetensors"
    checkpoint.write(path, {"x": torch.ones(2)}, {"fingerprint": "f", "step": 1})

    def fails(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails)
        with pytest.raises(lq.LoopQError, match=r"Cannot write the checkpoint .*disk full"):
            checkpoint.write(path, {"x": torch.zeros(2)}, {"fingerprint": "f", "step": 2})
    tensors, facts = checkpoint.read(path, "f")
    assert tensors["x"].tolist() == [1.0, 1.0] and facts["step"] == 1
    assert [item.name for item in path.parent.iterdir()] == [path.name], "nothing is left lying about"
    assert checkpoint.read(tmp_path / "none", "f") is None
