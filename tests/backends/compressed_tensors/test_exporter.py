"""transformers loads the folder with compressed-tensors, and computes what the program computes."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compressed_tensors.quantization.lifecycle import forward
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch import Tensor

import loopq_compile as lq
from loopq_compile.backends.compressed_tensors.verify import verify
from loopq_compile.graph.state import get_tensor, set_tensor
from tests.backends.gguf.files import looped_llama, save_tokenizer, tokens

POSITIVE = {"signed_scales": False}


@cache
def compiled(scheme: lq.Scheme, tied: bool = False) -> lq.Program:
    return lq.compile(looped_llama(tie_word_embeddings=tied), scheme=scheme, method="symmetric")


def load(folder: Path, **options: Any) -> Any:
    """The model of a folder; complete, with no tensor left over."""
    model, found = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(found.values()), found
    return model.eval()


def difference(program: lq.Program, model: Any) -> float:
    with torch.no_grad():
        return float((program(tokens(2)).logits - model(tokens(2)).logits).abs().max())


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [
        (lq.Scheme(4, 16, **POSITIVE), "W4A16 in groups of 32"),
        (lq.Scheme(4, 16, group_size=-1, **POSITIVE), "W4A16 in whole rows"),
        (lq.Scheme(3, 16, **POSITIVE), "W4A16 in groups of 32"),
        (lq.Scheme(8, 16), "W8A16 in groups of 32"),
    ],
    ids=lambda value: value.name if isinstance(value, lq.Scheme) else value,
)
def test_weight_only_logits_are_those_of_the_program(scheme: lq.Scheme, kind: str, tmp_path: Path) -> None:
    program = compiled(scheme)
    report = program.export_hugging_face(tmp_path)
    assert (report.grids, report.ignored, report.dtype, report.scale_change) == ({kind: 28}, 1, "float32", 0.0)
    model = load(tmp_path)
    assert difference(program, model) < 1e-5
    wanted = program.generate(tokens(1, 8), max_new_tokens=6)
    assert torch.equal(model.generate(tokens(1, 8), max_new_tokens=6, do_sample=False, eos_token_id=None), wanted)


@pytest.mark.parametrize(
    ("scheme", "format", "strategy"),
    [
        (lq.Scheme(8, 8, group_size=-1), "int-quantized", "token"),
        (lq.Scheme(4, 8, group_size=-1, **POSITIVE), "pack-quantized", "token"),
        (lq.Scheme(4, 8, **POSITIVE), "pack-quantized", "group"),
    ],
    ids=lambda value: f"{value.name}-{value.group_size}" if isinstance(value, lq.Scheme) else value,
)
def test_rounded_activations(
    scheme: lq.Scheme, format: str, strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package divides the largest magnitude by 127.5, this compiler (and vLLM's kernels) by 127: nothing else
    differs."""
    program = compiled(scheme)
    program.export_hugging_face(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    inputs = settings["config_groups"]["group_0"]["input_activations"]
    assert (settings["format"], inputs["strategy"], inputs["num_bits"]) == (format, strategy, 8)
    model = load(tmp_path)
    change = difference(program, compiled(lq.Scheme(**{**scheme.to_dict(), "activation_bits": 16})))
    assert 0 < difference(program, model) < 1.5 * change
    scales = forward.compute_dynamic_scales_and_zp

    def ours(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        scale, zero_point = scales(*args, **kwargs)
        return scale * (127.5 / 127), zero_point

    monkeypatch.setattr(forward, "compute_dynamic_scales_and_zp", ours)
    assert difference(program, model) < 0.2 * change


def test_negative_scales_are_refused_or_get_zero_points(tmp_path: Path) -> None:
    program = compiled(lq.Scheme(4, 16))
    with pytest.raises(lq.LoopQError, match="signed_scales=False"):
        program.export_hugging_face(tmp_path)
    assert not list(tmp_path.iterdir())
    report = program.export_hugging_face(tmp_path, zero_points=True)
    assert report.grids == {"W4A16 in groups of 32, with zero points": 28}
    # transformers 5.24 with compressed-tensors 0.20 does not load packed zero points without this.
    model = load(tmp_path, quantization_config=transformers.CompressedTensorsConfig(dequantize=True))
    assert difference(program, model) < 1e-5


def test_a_tied_head_is_stored_once_and_untied_if_it_is_quantized(tmp_path: Path) -> None:
    program = compiled(lq.Scheme(4, 16, **POSITIVE), tied=True)
    program.export_hugging_face(tmp_path / "tied")
    stored = load_file(tmp_path / "tied/model.safetensors")
    assert "model.embed_tokens.weight" in stored and "lm_head.weight" not in stored
    model = load(tmp_path / "tied")
    assert model.lm_head.weight is model.model.embed_tokens.weight and difference(program, model) < 1e-5

    program = compiled(lq.Scheme(4, 16, quantize=("*embed_tokens",), **POSITIVE), tied=True)
    report = program.export_hugging_face(tmp_path / "untied")
    assert report.ignored == 0
    assert {"lm_head.weight_packed", "model.embed_tokens.weight"} <= set(
        load_file(tmp_path / "untied/model.safetensors")
    )
    assert difference(program, load(tmp_path / "untied")) < 1e-5


def test_learned_weights_and_folded_gains_arrive(tmp_path: Path) -> None:
    """`loopq-plain` moves smoothing factors into gains of norms. A saved program knows all that the export needs."""
    model = looped_llama()
    scheme = lq.Scheme(4, 8, **POSITIVE)
    learned = lq.compile(model, scheme=scheme, method="loopq-plain", calibration=[tokens(2)], steps=2)
    learned.save(tmp_path / "program")
    program = lq.load(tmp_path / "program")
    program.export_hugging_face(tmp_path / "out", dtype="float16")
    back = load(tmp_path / "out", dtype=torch.float32)
    changed = 0
    for layer in (0, 1, 3):
        for name in ("input_layernorm", "post_attention_layernorm"):
            name = f"model.layers.{layer}.{name}.weight"
            gain, found = get_tensor(program.graph_module, name), back.get_parameter(name)
            torch.testing.assert_close(found.data, gain.data, rtol=1e-3, atol=0)
            changed += not torch.allclose(found, model.get_parameter(name), rtol=1e-2)
    assert changed == 6
    assert difference(program, back) < 0.2


def test_mixed_precision_names_its_layers(tmp_path: Path) -> None:
    program = compiled(lq.Scheme(4, 16, skip=("*.o_proj",), **POSITIVE))
    report = program.export_hugging_face(tmp_path)
    ignored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["ignore"]
    assert report.ignored == 5 and set(ignored) == {
        "lm_head",
        *(f"model.layers.{i}.self_attn.o_proj" for i in range(4)),
    }
    assert difference(program, load(tmp_path)) < 1e-5


def test_half_precision_states_what_it_changes(tmp_path: Path) -> None:
    report = compiled(lq.Scheme(4, 16, **POSITIVE)).export_hugging_face(tmp_path, dtype="bfloat16")
    assert 0 < report.scale_change < 2**-8 and report.dtype == "bfloat16"
    assert {str(t.dtype) for t in load_file(tmp_path / "model.safetensors").values()} == {
        "torch.bfloat16", "torch.int32", "torch.int64",
    }  # fmt: skip
    assert load(tmp_path).dtype == torch.bfloat16


def test_tokenizer_and_settings_are_copied_and_other_files_stay(tmp_path: Path) -> None:
    program, source, goal = compiled(lq.Scheme(4, 16, **POSITIVE)), tmp_path / "source", tmp_path / "goal"
    source.mkdir()
    goal.mkdir()
    save_tokenizer(source)
    (source / "generation_config.json").write_text('{"eos_token_id": 3}')
    (goal / "notes.txt").write_text("mine")
    for _ in range(2):  # the second export replaces the first
        program.export_hugging_face(goal, tokenizer=source)
    assert (goal / "notes.txt").read_text() == "mine"
    assert (goal / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert load(goal).generation_config.eos_token_id == 3
    assert "compressed-tensors" in ModelCard.load(goal / "README.md").data.tags
    assert verify(goal).unlisted == ("notes.txt",)
    assert transformers.AutoTokenizer.from_pretrained(goal)("the loop")["input_ids"]
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/config.json").write_text("{}")
    with pytest.raises(lq.LoopQError, match="no manifest says"):
        program.export_hugging_face(tmp_path / "theirs")
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["config.json"]
    (goal / "config.json").write_text("{}")
    with pytest.raises(lq.LoopQError, match="changed or cut off"):
        verify(goal)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scheme": lq.Scheme(4, 4, **POSITIVE), "calibration": None}, "4-bit activations"),
        ({"scheme": lq.Scheme(4, 8, activation="static", **POSITIVE)}, "static scales of activations"),
        ({"method": "smoothquant"}, "a transform of activations"),
    ],
)
def test_what_the_format_cannot_express(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    whole = {"scheme": lq.Scheme(4, 8, **POSITIVE), "method": "symmetric", "calibration": [tokens(1)]} | options
    program = lq.compile(looped_llama(), **whole)
    with pytest.raises(lq.LoopQError, match=words) as caught:
        program.export_hugging_face(tmp_path)
    assert "loopq-plain" in str(caught.value) or "scheme" in str(caught.value)


@pytest.mark.parametrize(("rows", "words"), [(1, "clipped ranges"), (2, "ranges per loop")])
def test_clipped_ranges(rows: int, words: str, tmp_path: Path) -> None:
    program = copy.deepcopy(compiled(lq.Scheme(4, 8, **POSITIVE)))
    name = next(name for name, _ in program.graph_module.named_buffers() if "activation_clip" in name)
    set_tensor(program.graph_module, name, get_tensor(program.graph_module, name).repeat(rows, 1) * 0.9)
    with pytest.raises(lq.LoopQError, match=f"{words} of activations .*loopq-plain"):
        program.export_hugging_face(tmp_path)


def test_other_models_and_caches(tmp_path: Path) -> None:
    from tests.tiny import tiny_program

    with pytest.raises(lq.LoopQError, match="another kind of model"):
        tiny_program("w8a16", method="symmetric").export_hugging_face(tmp_path)
    with pytest.raises(lq.LoopQError, match="with a cache"):
        compiled(lq.Scheme(4, 16, **POSITIVE)).with_cache().export_hugging_face(tmp_path)
    assert not list(tmp_path.iterdir())
