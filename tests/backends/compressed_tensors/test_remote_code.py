"""A model with its own code, like the hub's Ouro: loops in the code, a gate that the program does not need, and a
module that stands in it under two names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import loopq_compile as lq

HELPER = """
def looped(block, x, times):
    for _ in range(times):
        x = x + block(x)
    return x
"""
CODE = """
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .looping import looped


class LoopedConfig(PretrainedConfig):
    model_type = "looped_for_export"

    def __init__(self, vocab_size=64, hidden_size=32, total_ut_steps=3, **others):
        super().__init__(**others)
        self.vocab_size, self.hidden_size, self.total_ut_steps = vocab_size, hidden_size, total_ut_steps


class LoopedForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = LoopedConfig

    def __init__(self, config):
        super().__init__(config)
        width = config.hidden_size
        self.embed = nn.Embedding(config.vocab_size, width)
        self.block = nn.Sequential(nn.RMSNorm(width), nn.Linear(width, width), nn.SiLU())
        self.again = self.block
        self.gate = nn.Linear(width, 1)
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, use_cache=None, **others):
        x = looped(self.again, looped(self.block, self.embed(input_ids), self.config.total_ut_steps), 1)
        self.gate(x)
        return CausalLMOutputWithPast(logits=self.lm_head(x))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    path = tmp_path / "Looped"
    path.mkdir()
    (path / "modeling_looped.py").write_text(CODE)
    (path / "looping.py").write_text(HELPER)
    config = {
        "model_type": "looped_for_export", "architectures": ["LoopedForCausalLM"], "dtype": "float32",
        "auto_map": {
            "AutoConfig": "modeling_looped.LoopedConfig", "AutoModelForCausalLM": "modeling_looped.LoopedForCausalLM",
        },
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    shapes = {"embed.weight": (64, 32), "block.1.weight": (32, 32), "block.1.bias": (32,), "lm_head.weight": (64, 32)}
    weights = {name: torch.randn(shape) / 6 for name, shape in {**shapes, "gate.weight": (1, 32)}.items()}
    save_file({**weights, "block.0.weight": torch.ones(32), "gate.bias": torch.ones(1)}, path / "model.safetensors")
    return path


def test_code_is_copied_and_shared_modules_are_stored_once(folder: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    program = lq.compile(model, ids, scheme=lq.Scheme(4, 16, signed_scales=False), method="symmetric")
    for name, source in (("module", model), ("folder", folder)):
        report = program.export_hugging_face(tmp_path / name, source=source, trust_remote_code=True)
        assert report.copies == 0
        stored = load_file(tmp_path / name / "model.safetensors")
        assert "block.1.weight_packed" in stored and not any(key.startswith("again") for key in stored)
        assert torch.equal(stored["gate.weight"], model.gate.weight)
        # Without `dequantize`, compressed-tensors 0.20 refuses a module that stands in a model under two names.
        plain = transformers.CompressedTensorsConfig(dequantize=True)
        options = {"trust_remote_code": True, "quantization_config": plain}
        back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, **options)
        assert back.again is back.block
        with torch.no_grad():
            torch.testing.assert_close(back(ids).logits, program(ids).logits, rtol=0, atol=1e-5)
        assert back.generate(ids, max_new_tokens=3, do_sample=False, use_cache=False).shape == (2, 12)
        assert {path.name for path in (tmp_path / name).glob("*.py")} == {"modeling_looped.py", "looping.py"}


def test_a_saved_program_needs_the_folder_and_trust(folder: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    ids = torch.zeros(2, 9, dtype=torch.int64)
    lq.compile(model, ids, scheme="w8a16", method="symmetric").save(tmp_path / "program")
    program = lq.load(tmp_path / "program")
    with pytest.raises(lq.LoopQError, match="source=FOLDER"):
        program.export_hugging_face(tmp_path / "out")
    with pytest.raises(lq.LoopQError, match="trust_remote_code=True"):
        program.export_hugging_face(tmp_path / "out", source=folder)
    assert not (tmp_path / "out").exists()
    program.export_hugging_face(tmp_path / "out", source=folder, trust_remote_code=True)
    (folder / "model.safetensors").unlink()
    with pytest.raises(lq.LoopQError, match=r"'gate\.weight'"):
        program.export_hugging_face(tmp_path / "out", source=folder, trust_remote_code=True)
