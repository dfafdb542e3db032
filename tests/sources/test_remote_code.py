"""A folder like the hub's Ouro: its own remote code, safetensors, tokenizer. One command compiles it, if trusted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from typer.testing import CliRunner

import loopq_compile as lq
from loopq_compile.cli import app
from tests.cli_models import TEXT, WORDS, tokenizer

CODE = """
import pathlib

import torch
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

(pathlib.Path(__file__).parent / "ran").touch()


class LoopedConfig(PretrainedConfig):
    model_type = "looped_for_tests"

    def __init__(self, vocab_size=64, hidden_size=32, total_ut_steps=3, **others):
        super().__init__(**others)
        self.vocab_size, self.hidden_size, self.total_ut_steps = vocab_size, hidden_size, total_ut_steps


class LoopedForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = LoopedConfig

    def __init__(self, config):
        super().__init__(config)
        width = config.hidden_size
        self.embed, self.norm = nn.Embedding(config.vocab_size, width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, use_cache=None):
        x = self.embed(input_ids)
        for _ in range(self.config.total_ut_steps):
            q, k, v = self.qkv(self.norm(x)).unsqueeze(1).chunk(3, dim=-1)
            x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1))
        return CausalLMOutputWithPast(logits=self.lm_head(x))
"""
COMMAND = ["--scheme", "w4a4", "--steps", "2", "--samples", "8", "--length", "16"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`config.json` names the code as the hub's repositories do; weights were saved by the same code."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    path = tmp_path / "Looped-1.4B"
    path.mkdir()
    (path / "modeling_looped.py").write_text(CODE)
    config = {
        "model_type": "looped_for_tests", "architectures": ["LoopedForCausalLM"], "vocab_size": 64, "hidden_size": 32,
        "total_ut_steps": 3, "dtype": "float32", "eos_token_id": 5,
        "auto_map": {
            "AutoConfig": "modeling_looped.LoopedConfig", "AutoModelForCausalLM": "modeling_looped.LoopedForCausalLM",
        },
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    (path / "generation_config.json").write_text('{"eos_token_id": [5, 7], "temperature": 0.7, "do_sample": true}')
    torch.manual_seed(0)
    shapes = {"embed": (64, 32), "qkv": (96, 32), "out": (32, 32), "lm_head": (64, 32)}
    weights = {f"{name}.weight": torch.randn(shape) / 6 for name, shape in shapes.items()}
    weights["norm.weight"] = torch.ones(32)
    from safetensors.torch import save_file

    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer(), unk_token=WORDS[0], eos_token="w4")
    fast.chat_template = "{{ messages }}"
    fast.save_pretrained(path)
    return path


def test_untrusted_code_does_not_run_and_the_risk_is_explained(folder: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["compile", str(folder), *COMMAND, "--out", str(tmp_path / "made")])
    assert result.exit_code == 1
    said = " ".join(result.stderr.split())
    assert "brings its own Python code, which would run on this machine with all your rights" in said
    assert "Read the .py files" in said and "--trust-remote-code" in said
    assert not (tmp_path / "made").exists()
    assert not list(tmp_path.rglob("ran"))


def test_one_command_compiles_it_and_settings_travel_along(folder: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    command = ["compile", str(folder), *COMMAND, "--out", str(made), "--trust-remote-code"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "calibrating on 8 samples of 16 tokens from docs" in result.output
    assert list(tmp_path.rglob("ran"))
    line = "calibrated on docstrings of the installed libraries; give --calibration for the text you care about"
    assert " ".join(result.output.split()).count(line) == 1 and line in (made / "README.md").read_text()
    program = lq.load(made)
    assert (program.log[0].pass_name, program.log[0].notes) == ("calibration-text", [line])
    assert program.loops.describe() == "3 x (norm, qkv, out)"
    assert program.scheme is not None and program.scheme.name == "w4a4"
    assert json.loads((made / "generation_config.json").read_text())["eos_token_id"] == [5, 7]
    again = transformers.AutoTokenizer.from_pretrained(made)
    assert again("w3 w5").input_ids == [4, 6] and again.eos_token == "w4" and again.chat_template == "{{ messages }}"
    assert not list(made.glob("*.py"))  # the program needs none of that code
    ids = torch.tensor([again(TEXT).input_ids[:9]])
    text = program.as_hugging_face(made).generate(ids, max_new_tokens=40, do_sample=False)
    assert torch.equal(text, program.generate(ids, 40, eos_token_id=[5, 7]))
