"""`bench speed`: tokens a second of a model as it is and as quantized files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loopq_compile.bench.speed_session import Job, measure
from loopq_compile.cli import app
from loopq_compile.errors import LoopQError


def test_the_command(tmp_path: Path) -> None:
    arguments = ["bench", "speed", "bundled", "--schemes", "w4a8", "--methods", "symmetric,quarot", "--head-bits", "8"]
    arguments += ["--pytorch", "float32", "--json", "--out", str(tmp_path)]
    arguments += ["--prefill", "8", "--decode", "1,2", "--context", "4", "--steps", "2", "--repeats", "1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)["data"]
    assert [x["runs"] for x in data] == [
        "PyTorch float32",
        "ONNX Runtime float32",
        "ours w4a8, head w8",
        "ours w4a8 quarot, head w8",
    ]
    for x in data:
        assert x["load_ms"] > 0 and x["memory"] > 0
        assert set(x["prefill"]) == {"8"} and set(x["decode"]) == {"1", "2"}
        assert min(*x["prefill"].values(), *x["decode"].values()) > 0
    assert data[2]["bytes"] < data[1]["bytes"] / 2
    assert (tmp_path / "speed.md").read_text().count("| ours w4a8") == 2


def test_a_model_that_cannot_be_measured_is_named(tmp_path: Path) -> None:
    with pytest.raises(LoopQError, match=r"missing\.onnx could not be measured"):
        measure(Job(str(tmp_path / "missing.onnx")))
