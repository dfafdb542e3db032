"""`bench speed`: tokens per second of a model and of its quantized files."""

from __future__ import annotations

import importlib.util
import itertools
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from loopq_compile.bench import random_models, speed_contest, speed_session
from loopq_compile.bench import speed as speed_module
from loopq_compile.bench.cells import Cells
from loopq_compile.bench.speed import speed
from loopq_compile.bench.speed_session import Job, measure
from loopq_compile.bench.speed_torch import WAYS, decoders, quantize_with_torchao, quantized_weights
from loopq_compile.bundled import load_model
from loopq_compile.capture.to_graph import capture
from loopq_compile.cli import app
from loopq_compile.errors import LoopQError
from loopq_compile.models import OuroConfig
from loopq_compile.program import Program
from tests.decoding import ids
from tests.passes.loops.test_exit_early import ouro

BRIEF = ["--prefill", "8", "--decode", "1,2", "--context", "4", "--steps", "2", "--repeats", "1", "--json"]
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A size by name that is small enough to measure."""
    config = OuroConfig(vocab_size=512, total_ut_steps=2, tie_word_embeddings=False, **SIZES)
    monkeypatch.setattr(random_models, "SIZES", {"tiny": lambda: config})


def test_the_command(tmp_path: Path, tiny: None) -> None:
    """A model of a named size with random weights, as PyTorch, as a float32 file, and as ours."""
    arguments = ["bench", "speed", "tiny", "--schemes", "w4a8", "--methods", "quarot", "--products", "packed,both"]
    arguments += ["--head-bits", "8", "--pytorch", "bfloat16", "--out", str(tmp_path), *BRIEF]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)["data"]
    ours = ["ours w4a8 quarot, head w8", "ours w4a8 quarot both, head w8"]
    assert [x["runs"] for x in data] == ["PyTorch bfloat16", "ONNX Runtime float32", *ours]
    for x in data:
        assert x["load_ms"] > 0 and 0 < x["memory"] <= x["peak"]
        assert set(x["prefill"]) == {"8"} and set(x["decode"]) == {"1", "2"}
        assert min(*x["prefill"].values(), *x["decode"].values()) > 0
    assert data[1]["bytes"] > 4 * 2 * 512 * 128
    assert data[2]["bytes"] < data[1]["bytes"] / 2 and data[2]["bytes"] < data[3]["bytes"] < data[1]["bytes"]
    assert (tmp_path / "speed.md").read_text().count("| ours w4a8") == 2


def stubbed(monkeypatch: pytest.MonkeyPatch, fails: str = "none") -> list[str]:
    """Rows are invented; names of what was measured are collected."""
    measured = []

    def fake(job: Job, reference: Path | None = None) -> dict[str, object]:
        measured.append(job.way)
        if job.way == fails:
            raise LoopQError("it is broken")
        rates = {"prefill": {"128": 1.0}, "decode": {"1": 1.0}}
        return {"load_ms": 1.0, "memory": 1, "peak": 2, "first_s": 3.25, **rates}

    monkeypatch.setattr(speed_contest, "measure", fake)
    monkeypatch.setattr(speed_module, "_write", lambda *_: ("model.onnx", {"bytes": 1, "nodes": 1}))
    return measured


JOB = Job("tiny", prefill=(128,), decode=(1,))


def test_a_rival_that_fails_has_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch, tiny: None) -> None:
    stubbed(monkeypatch, "compiled")
    report = speed(JOB, [], pytorch=["float32", "compiled"])
    assert [row[2] for row in report.rows] == ["", "failed", "0.0"]
    assert any("PyTorch float32, compiled: not measured. it is broken" in note for note in report.notes)
    stubbed(monkeypatch)
    assert speed(JOB, [], pytorch=["compiled"]).rows[0][4] == "3.2"


def test_finished_rows_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: None) -> None:
    measured = stubbed(monkeypatch, "compiled")
    speed(JOB, [], pytorch=["float32", "compiled"], cells=Cells(tmp_path))
    again = stubbed(monkeypatch)
    speed(JOB, [], pytorch=["float32", "compiled"], cells=Cells(tmp_path))
    assert measured == ["float32", "compiled", ""] and again == ["compiled"]


def test_rows_say_what_is_not_usual(monkeypatch: pytest.MonkeyPatch, tiny: None) -> None:
    """Products in int8 are measured where activations are quantized."""
    stubbed(monkeypatch)
    ways = {"head_bits": [None, 8], "products": ["packed", "int8"], "group_size": 64, "pytorch": []}
    rows = speed(JOB, ["w4a8", "w4a16"], **ways).rows  # type: ignore[arg-type]
    both = ["ours w4a8 g64", "ours w4a8 g64, head w8", "ours w4a8 int8 g64", "ours w4a8 int8 g64, head w8"]
    assert [row[0] for row in rows] == ["ONNX Runtime float32", *both, "ours w4a16 g64", "ours w4a16 g64, head w8"]


def test_torchao_is_left_out_with_a_note_where_it_is_missing(monkeypatch: pytest.MonkeyPatch, tiny: None) -> None:
    stubbed(monkeypatch)
    monkeypatch.setattr(speed_module.importlib.util, "find_spec", lambda name: None)
    report = speed(JOB, [], pytorch=["torchao"])
    assert len(report.rows) == 1 and "torchao is not installed" in report.notes[-1]


def test_what_cannot_be_measured_is_named(tmp_path: Path) -> None:
    with pytest.raises(LoopQError, match=r"missing\.onnx could not be measured"):
        measure(Job(str(tmp_path / "missing.onnx")))
    with pytest.raises(LoopQError, match=r"Unknown way 'compile' to run PyTorch\. Did you mean 'compiled'"):
        speed(JOB, pytorch=["compile"])
    refused = CliRunner().invoke(app, ["bench", "speed", "bundled", "--layers", "2"])
    assert refused.exit_code == 1 and "--layers is for models with random weights" in refused.output


def test_the_compiled_graph_reads_like_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = ouro(), ids(1, 6)
    calls = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: calls.append(options))
    decoder = decoders(model, WAYS["compiled"])()
    mask = torch.ones_like(text)
    decoder(text[:, :5], mask[:, :5])
    torch.testing.assert_close(decoder(text[:, 5:], mask), model(text).logits[:, -1], atol=1e-5, rtol=1e-4)
    assert calls == [{"dynamic": True}]


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_torchao_quantizes_the_linears_that_our_schemes_quantize() -> None:
    model, text = load_model(), torch.randint(5, 500, (1, 16), generator=torch.Generator().manual_seed(0))
    program = Program(capture(model, torch.ones(2, 8, dtype=torch.int64)))
    weights = quantized_weights(program)
    assert len(weights) == len(set(weights)) == 3 * 7 and not any("head" in w or "gate.w" in w for w in weights)
    exact = model(text).logits
    quantize_with_torchao(program.graph_module, weights)
    error = (program(text).logits - exact).norm() / exact.norm()
    assert 0.01 < error < 0.5
    kinds = {type(program.graph_module.get_parameter(weight)).__name__ for weight in weights}
    assert kinds == {"IntxUnpackedToInt8Tensor"}


def test_the_session_loads_models_with_random_weights() -> None:
    config = OuroConfig(vocab_size=64, tie_word_embeddings=True, **SIZES)
    model = speed_session.load(Job("tiny", config=config.to_dict()), "bfloat16")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_random_weights_are_not_equal():
    """ONNX Runtime keeps one copy of equal weights, which would make a model small and fast."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = random_models.random_model(OuroConfig(vocab_size=64, **sizes))
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    assert len(weights) > 20
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(weights, 2) if a.shape == b.shape)
    assert all(0.9 < float(x.std() * x.shape[1] ** 0.5) < 1.1 for x in weights)
