"""`bench calibrate`: the parts of a step, in every phase."""

import json

import pytest
from typer.testing import CliRunner

import loopq_compile as lq
from loopq_compile.bench.calibrate import PARTS, step_parts
from loopq_compile.capture.to_graph import capture
from loopq_compile.cli import app
from loopq_compile.graph.options import CalibrationOptions
from tests.tiny import tiny_model, tokens

OPTIONS = CalibrationOptions(fused="off", batch_rows=1)


def test_every_phase_is_timed_by_parts():
    batches = [tokens(seed) for seed in range(4)]
    report = step_parts(capture(tiny_model(), tokens()), lq.Scheme.parse("w4a4"), "loopq", batches, OPTIONS, repeats=1)
    first, second = report.data
    assert "transform" in first["learns"] and "rounding" in second["learns"]
    for line in report.data:
        assert all(line[name] > 0 for name in PARTS)
        assert line["step"] == pytest.approx(sum(line[name] for name in PARTS if name != "plain forward"))
        assert line["tokens"] == batches[0].shape[1]


def test_a_method_without_steps_is_refused():
    with pytest.raises(lq.LoopQError, match="takes no steps"):
        step_parts(capture(tiny_model(), tokens()), lq.Scheme.parse("w4a4"), "las", [tokens()], OPTIONS)


def test_the_command_prints_the_table():
    options = "--batch-rows 1 --length 16 --repeats 1 --method flatquant-e2e --json"
    done = CliRunner().invoke(app, ["bench", "calibrate", *options.split()])
    assert done.exit_code == 0, done.output
    assert len(json.loads(done.stdout)["data"]) == 2
