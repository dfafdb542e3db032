"""Predictions by formula for machines that are not here."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

import loopq_compile as lq
from loopq_compile.analysis.estimate import estimate
from loopq_compile.analysis.machine import Machine
from loopq_compile.capture.to_graph import capture
from loopq_compile.cli import app
from loopq_compile.graph.options import CalibrationOptions
from loopq_compile.methods import get_pipeline, method_names
from tests.tiny import tiny_model, tokens

CARD = Machine.parse("32GiB, 105TFLOPS, 1.79TB/s")


def predicted(machine=CARD, method="loopq", **options):
    graph = capture(tiny_model(), tokens())
    batches = [tokens(seed) for seed in range(8)]
    given = CalibrationOptions(**options)
    return estimate(graph, lq.Scheme.parse("w4a4"), get_pipeline(method), batches, given, machine=machine)


def test_a_machine_is_read():
    assert Machine(32 * 2**30, 105e12, 1.79e12) == CARD
    assert Machine.parse("24GB,80GFLOPS,20GB/s") == Machine(24e9, 80e9, 20e9)
    for text in ("32GiB", "32GiB,105TFLOPS", "32GiB,105TFLOPS,x", "32GiB,105TFLOPS,1TB/s,1TB/s", "0GiB,1TFLOPS,1TB/s"):
        with pytest.raises(lq.LoopQError, match="such as 32GiB,105TFLOPS"):
            Machine.parse(text)


def test_time_grows_with_steps_and_falls_with_the_rates():
    few, many = predicted(steps=100), predicted(steps=1000)
    slow = predicted(replace(CARD, flops=CARD.flops / 1e4, bandwidth=CARD.bandwidth / 1e4), steps=100)
    assert 5 * few.seconds < many.seconds and slow.seconds > few.seconds
    assert few.memory == many.memory
    names = [cost.name for cost in few.passes]
    assert names == ["calibrate", "select-transforms"] * 2 + ["calibrate", "solve-weights", "calibrate"]


def test_every_method_that_learns_is_predicted():
    for method in method_names():
        try:
            assert predicted(method=method).seconds > 0
        except lq.LoopQError as error:
            assert method in ("symmetric", "smoothquant", "quarot", "las") and "learns nothing" in str(error)


def test_a_machine_that_is_too_small_is_refused():
    with pytest.raises(lq.LoopQError, match="GiB are available"):
        predicted(replace(CARD, memory=8 << 20))


def test_the_command_predicts_for_a_machine(tmp_path):
    arguments = ["compile", "bundled", "--out", str(tmp_path / "p"), "--samples", "8", "--length", "16"]
    told = [*arguments, "--machine", "32GiB,105TFLOPS,1.79TB/s"]
    refused = CliRunner().invoke(app, told)
    assert refused.exit_code and "needs --dry-run" in refused.stderr
    done = CliRunner().invoke(app, [*told, "--dry-run", "--json"])
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["memory"] == max(item["memory"] for item in found["passes"])
    assert abs(found["seconds"] - sum(item["seconds"] for item in found["passes"])) < 1e-6
