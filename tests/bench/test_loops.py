"""`bench loops`: the cost of exported files by number of loops."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loopq_compile.bench import session
from loopq_compile.bench.loops import FORMS, growth
from loopq_compile.cli import app
from loopq_compile.errors import LoopQError
from loopq_compile.graph.scheme import Scheme
from tests.cli_models import tiny_ouro


@pytest.mark.nightly
def test_rolled_files_do_not_grow_with_the_number_of_loops() -> None:
    report = growth(tiny_ouro, (2, 4), Scheme.parse("w4a8"), length=4, targets=["onnxruntime"])
    by = {(x["form"], x["loops"]): x for x in report.data}
    assert len(by) == 2 * len(FORMS)
    assert by["rolled", 2]["nodes"] == by["rolled", 4]["nodes"]
    assert by["unrolled", 2]["nodes"] < 0.7 * by["unrolled", 4]["nodes"]
    assert abs(by["rolled", 4]["bytes"] - by["rolled", 2]["bytes"]) < 1000
    assert all(x["load_ms"] > 0 and x["memory"] > 0 and x["call_ms"] > 0 for x in report.data)


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(LoopQError, match=r"could not open or run .*model\.onnx"):
        session.measure(tmp_path / "model.onnx", 4)


def test_the_command(tmp_path: Path) -> None:
    arguments = ["bench", "loops", "bundled", "--values", "2", "--targets", "qdq", "--json", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert [x["loops"] for x in content["data"]] == [2, 2] and content["model"] == "bundled"
    assert (tmp_path / "loops.md").read_text().count("qdq") == 2
