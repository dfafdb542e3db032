"""From a Hugging Face folder to one in compressed-tensors, on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import transformers
from typer.testing import CliRunner

from loopq_compile.cli import app
from tests.backends.gguf.files import save_tokenizer


def run(*arguments: object, status: int = 0) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == status, done.output
    return done.output


def test_compile_export_and_verify(tmp_path: Path) -> None:
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    options = ["--scheme", "w4a16", "--method", "symmetric", "--positive-scales"]
    run("compile", f"{tmp_path / 'model'}@1-1x2", *options, "--out", tmp_path / "program")
    export = ["export", tmp_path / "program", "--target", "compressed-tensors", "--out", tmp_path / "out"]
    report = json.loads(run(*export, "--json"))
    assert report["grids"] == {"W4A16 in groups of 32": 21} and report["copies"] == 7
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["num_hidden_layers"] == 3 and written["architectures"] == ["LlamaForCausalLM"]
    assert str(tmp_path) not in (tmp_path / "out/config.json").read_text() + (tmp_path / "out/README.md").read_text()
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("again")["input_ids"]
    assert "compressed-tensors, pack-quantized" in run("verify", tmp_path / "out")
    assert "not with compressed-tensors" in run(*export, "--cache", status=1)
    assert "--zero-points goes with" in run(*export[:2], "--out", tmp_path / "x", "--zero-points", status=1)
