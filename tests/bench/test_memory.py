"""`bench memory`: every pass is measured in models of several depths."""

import json

import pytest
from typer.testing import CliRunner

import loopq_compile as lq
from loopq_compile.bench.memory import memory
from loopq_compile.cli import app
from loopq_compile.methods import get_pipeline
from loopq_compile.pipeline import pass_name


def test_every_pass_of_the_method_is_measured():
    options = "--width 64 --layers 1,2 --loops 2 --steps 2 --length 16 --json"
    result = CliRunner().invoke(app, ["bench", "memory", *options.split()])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)["data"]
    passes = [pass_name(item) for item in get_pipeline("loopq")]
    assert [line["pass"] for line in data] == [*passes, "all together"]
    assert all(len(line["peaks"]) == len(line["seconds"]) == 2 for line in data)
    assert all(second > 0 for line in data for second in line["seconds"])
    assert data[-1]["peaks"] == [max(line["peaks"][run] for line in data[:-1]) for run in (0, 1)]
    assert all(len(line[key]) == 2 for line in data for key in ("predicted_seconds", "predicted_peaks"))
    predicted = {line["pass"]: line["predicted_peaks"][0] for line in data}
    assert predicted["all together"] >= predicted["calibrate"] > predicted["tag-loops"]


def test_it_needs_two_depths_and_a_width_of_whole_heads():
    with pytest.raises(lq.LoopQError, match="at least two numbers of layers"):
        memory(64, [2, 2])
    with pytest.raises(lq.LoopQError, match="width=100 is not a multiple of 64"):
        memory(100, [1, 2])


def test_processes_report_the_largest_peak_once():
    options = "--width 64 --layers 1,2 --loops 2 --length 16 --method las --processes 2 --json"
    result = CliRunner().invoke(app, ["bench", "memory", *options.split()])
    assert result.exit_code == 0, result.output
    lines = json.loads(result.stdout)["data"]
    assert [line["pass"] for line in lines] == [*map(pass_name, get_pipeline("las")), "all together"]
