"""`--device`: commands run on a device other than the CPU, which is simulated."""

import json

import pytest
from typer.testing import CliRunner

from loopq_compile import bundled
from loopq_compile.capture import model_checks
from loopq_compile.cli import app
from loopq_compile.cli.common import load
from tests.cli_models import TEXT, tiny_ouro, tokenizer
from tests.simulated.device import DEVICE, simulated


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
    held_out = bundled.HeldOut(TEXT, (TEXT,), 1, 2, len(TEXT), 2 * len(TEXT))
    monkeypatch.setattr(bundled, "load_model", tiny_ouro)
    monkeypatch.setattr(bundled, "load_tokenizer", tokenizer)
    monkeypatch.setattr(bundled, "held_out_text", lambda: held_out)


def run(*arguments, status=0):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == status, done.output
    return done


def test_commands_run_on_a_device(tmp_path, monkeypatch):
    monkeypatch.setattr(model_checks, "_check_kinds", lambda model: None)  # which knows tensors by their Python type
    program, there, here = tmp_path / "program", ["--device", DEVICE], ["--device", "cpu"]
    text = ["--length", 16, "--stride", 16, "--max-tokens", 64, "--json"]
    with simulated():
        run("compile", "bundled", "--method", "symmetric", *there, "--out", program)
        assert load(str(program), device="sim").model.device == DEVICE
        scores = json.loads(run("eval", "bundled", program, *there, *text).stdout)["results"]
        run(
            "report", program, "--model", "bundled", "--max-tokens", 64, "--samples", 1, *there, "--out", tmp_path / "r"
        )
        made = run("generate", program, "--prompt", "the", "--max-new-tokens", 2, *there).stdout
    expected = json.loads(run("eval", "bundled", program, *here, *text).stdout)["results"]
    for score, other in zip(scores, expected, strict=True):
        assert score["perplexity"] == pytest.approx(other["perplexity"], rel=1e-3)
    assert run("generate", program, "--prompt", "the", "--max-new-tokens", 2).stdout == made


@pytest.mark.parametrize(
    "command",
    [
        ["compile", "bundled", "--out", "unused"],
        ["eval", "bundled"],
        ["generate", "bundled", "--prompt", "the"],
        ["report", "unused"],
        ["bench", "quality"],
        ["bench", "table1"],
    ],
    ids=" ".join,
)
def test_a_device_that_is_not_there_is_refused_before_anything_is_loaded(command, monkeypatch):
    def loads():
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(bundled, "load_model", loads)
    assert "device='gpu' is not a device" in " ".join(run(*command, "--device", "gpu", status=1).stderr.split())
