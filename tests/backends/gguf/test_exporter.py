"""What stands in a file: every tensor of the program, under llama.cpp's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import loopq_compile as lq
from loopq_compile.backends.gguf.architectures import find_architecture
from loopq_compile.backends.gguf.contents import Contents, Stored
from loopq_compile.backends.gguf.stack import EMBEDDINGS, read_stack
from loopq_compile.graph.state import get_state, get_tensor
from loopq_compile.operators import ops
from loopq_compile.passes.quantize.round_scales import RoundScales
from tests.backends.gguf.files import compiled, field, hrm, looped_llama, nanbeige, tensors

NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
EXACT = lq.pipelines.symmetric().insert_after("pack-weights", RoundScales())
ORDER = (0, 1, 1, 3)
"""Layers of `looped_llama` by position, as the program names them."""


def program_weight(program: lq.Program, name: str, heads: int = 0) -> np.ndarray:
    """The dequantized weight; with `heads`, rows in the order of llama.cpp's rotary positions, one by one."""
    codes, scale = (get_tensor(program.graph_module, f"{name}.weight_{part}") for part in ("codes", "scale"))
    weight = ops.dequantize(codes, scale, codes.shape[1] // scale.shape[1]).numpy()
    if not heads:
        return weight
    size = len(weight) // heads
    rows = [head * size + half * (size // 2) + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return weight[rows]


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3"])
def test_every_weight_comes_back_exactly(kind: str, tmp_path: Path) -> None:
    model, program = compiled(kind)
    report = program.export_gguf(tmp_path / "m.gguf", config=model.config, embeddings="f32", head="f32")
    assert (report.layers, report.stored_layers, report.scale_change) == (4, 4, 0.0)
    found = tensors(tmp_path / "m.gguf")
    state = dict(model.named_parameters())
    for position, layer in enumerate(ORDER):
        for name, module in NAMES.items():
            heads = {"attn_q": 4, "attn_k": 2}.get(name, 0) if kind == "Llama" else 0
            wanted = program_weight(program, f"model.layers.{layer}.{module}", heads)
            np.testing.assert_array_equal(found.pop(f"blk.{position}.{name}.weight"), wanted)
            if f"model.layers.{layer}.{module}.bias" in state:
                bias = state[f"model.layers.{layer}.{module}.bias"].detach().numpy()
                np.testing.assert_array_equal(found.pop(f"blk.{position}.{name}.bias"), bias)
        norms = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
        norms |= {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"} if kind == "Qwen3" else {}
        for name, module in norms.items():
            gain = state[f"model.layers.{layer}.{module}.weight"].detach().numpy()
            np.testing.assert_array_equal(found.pop(f"blk.{position}.{name}.weight"), gain)
    others = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    for name, module in others.items():
        np.testing.assert_array_equal(found.pop(f"{name}.weight"), state[f"{module}.weight"].detach().numpy())
    assert not found


def test_nanbeige_is_stored_once(tmp_path: Path) -> None:
    config, program = nanbeige()
    report = program.export_gguf(tmp_path / "m.gguf", config=config)
    assert (report.architecture, report.layers, report.stored_layers) == ("nanbeige", 6, 2)
    assert field(tmp_path / "m.gguf", "nanbeige.num_loops") == 3
    assert field(tmp_path / "m.gguf", "nanbeige.skip_loop_final_norm") is False
    assert field(tmp_path / "m.gguf", "nanbeige.block_count") == 2
    assert field(tmp_path / "m.gguf", "nanbeige.attention.key_length") == 32
    found = tensors(tmp_path / "m.gguf")
    wanted = program_weight(program, "model.layers.1.self_attn.q_proj", heads=4)
    np.testing.assert_array_equal(found["blk.1.attn_q.weight"], wanted)
    assert not any(name.startswith("blk.2.") for name in found)


def test_both_stacks_of_hrm_text_are_stored_once(tmp_path: Path) -> None:
    model, program = hrm()
    report = program.export_gguf(tmp_path / "m.gguf", config=model.config, embeddings="f32", head="f32")
    assert (report.architecture, report.layers, report.stored_layers) == ("hrm_text", 12, 4)
    keys = {"block_count": 12, "hrm.layers_per_stack": 2, "hrm.h_cycles": 2, "hrm.l_cycles": 2, "hrm.prefix_lm": True}
    keys |= {"embedding_scale": 7.5, "attention.head_count_kv": 4, "attention.key_length": 32}
    assert {key: field(tmp_path / "m.gguf", f"hrm_text.{key}") for key in keys} == keys
    found = tensors(tmp_path / "m.gguf")
    for block, layer in enumerate(f"{stack}_module.layers.{at}" for stack in "LH" for at in range(2)):
        for name, module in {**NAMES, "attn_gate": "self_attn.gate_proj"}.items():
            wanted = program_weight(program, f"model.{layer}.{module}")
            np.testing.assert_array_equal(found.pop(f"blk.{block}.{name}.weight"), wanted)
    for name, value in {
        "token_embd.weight": model.model.embed_tokens.weight,
        "output.weight": model.lm_head.weight,
        "hrm.z_l_init": model.model.z_L_init,
    }.items():
        np.testing.assert_array_equal(found.pop(name), value.detach().numpy())
    assert not found
    lacking = {key: value for key, value in model.config.to_dict().items() if key != "embedding_scale"}
    with pytest.raises(lq.LoopQError, match="lacks embedding_scale"):
        program.export_gguf(tmp_path / "m.gguf", config=lacking)


def test_biases_have_no_place_in_hrm_text(tmp_path: Path) -> None:
    model, program = hrm(attention_bias=True, num_hidden_layers=1, H_cycles=1, L_cycles=1)
    with pytest.raises(lq.LoopQError, match=r"no place for 'model\.L_module\.layers\.0\.self_attn\.q_proj\.bias'"):
        program.export_gguf(tmp_path / "m.gguf", config=model.config)
    assert not (tmp_path / "m.gguf").exists()


LOW, HIGH = ("low.layers.0", "low.layers.1"), ("high.layers.0", "high.layers.1")


@pytest.mark.parametrize(
    "order",
    [LOW[:1], (*LOW, *HIGH, *LOW), (*LOW, *HIGH, *LOW, *LOW, *HIGH), (*LOW, *HIGH[:1]), (*HIGH, *LOW[::-1], *LOW)],
    ids=["one layer", "no high stack at the end", "other numbers of cycles", "stacks of other sizes", "another order"],
)
def test_other_cycles_are_refused(order: tuple[str, ...]) -> None:
    architecture = find_architecture("HrmTextForCausalLM")
    contents = Contents({EMBEDDINGS: Stored(torch.zeros(1, 1))}, order=order)
    with pytest.raises(lq.LoopQError, match="hrm_text does not run layers"):
        read_stack(contents, architecture)


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [("w8a16", "Q8_0"), ("w3a16", "Q4_0"), (lq.Scheme(4, 16, group_size=64), "Q4_0")],
    ids=["w8", "w3", "groups of 64"],
)
def test_other_grids_that_fit(scheme: Any, kind: str, tmp_path: Path) -> None:
    config, program = nanbeige(scheme)
    report = program.export_gguf(tmp_path / "m.gguf", config=config, embeddings="f16", head="f16")
    assert report.types[kind] == 14
    wanted = program_weight(program, "model.layers.1.mlp.down_proj")
    np.testing.assert_array_equal(tensors(tmp_path / "m.gguf")["blk.1.ffn_down.weight"], wanted)


def test_scales_that_are_not_float16_are_reported(tmp_path: Path) -> None:
    model, program = compiled(exact=False)
    report = program.export_gguf(tmp_path / "m.gguf", config=model.config)
    assert 0 < report.scale_change <= 2**-11
    assert "rounded to float16" in str(report)
    found = tensors(tmp_path / "m.gguf")["blk.0.ffn_up.weight"]
    wanted = program_weight(program, "model.layers.0.mlp.up_proj")
    np.testing.assert_allclose(found, wanted, rtol=2**-11)
    assert (found != wanted).any()


@pytest.mark.parametrize(("kind", "bound"), [("q8_0", 0.01), ("f16", 1e-3)])
def test_embeddings_and_head(kind: str, bound: float, tmp_path: Path) -> None:
    model, program = compiled()
    program.export_gguf(tmp_path / "m.gguf", config=model.config, embeddings=kind, head="f32")
    found = tensors(tmp_path / "m.gguf")
    wanted = model.model.embed_tokens.weight.detach().numpy()
    assert 0 < np.linalg.norm(found["token_embd.weight"] - wanted) < bound * np.linalg.norm(wanted)
    np.testing.assert_array_equal(found["output.weight"], model.lm_head.weight.detach().numpy())
    with pytest.raises(lq.LoopQError, match="no multiple of 256"):
        program.export_gguf(tmp_path / "m.gguf", config=model.config, head="q6_k")


def test_scaled_rotations_and_a_tied_head(tmp_path: Path) -> None:
    settings = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    settings |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    model = looped_llama(rope_parameters=settings, tie_word_embeddings=True)
    program = lq.compile(model, scheme="w4a8", method=EXACT)
    program.export_gguf(tmp_path / "m.gguf", config=model.config)
    found = tensors(tmp_path / "m.gguf")
    assert "output.weight" not in found
    factors = found["rope_freqs.weight"]
    base = 500000.0 ** (-np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(base / factors, model.model.rotary_emb.inv_freq.numpy(), rtol=1e-5)
    assert factors[0] == pytest.approx(1) and factors[-1] == pytest.approx(8)


def test_a_saved_program_is_written_alike(tmp_path: Path) -> None:
    model, program = compiled()
    program.save(tmp_path / "program")
    for name, each in (("one", program), ("two", lq.load(tmp_path / "program"))):
        each.export_gguf(tmp_path / f"{name}.gguf", config=model.config)
    one, two = (tensors(tmp_path / f"{name}.gguf") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all((one[name] == two[name]).all() for name in one)


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    model, program = compiled()
    for changed, words in (
        ({"rope_parameters": {"rope_theta": 1000.0, "rope_type": "default"}}, "rotary frequencies differ"),
        ({"rope_parameters": {"rope_theta": 10000.0, "rope_type": "yarn"}}, "'yarn'"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"sliding_window": 64}, "sliding windows"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
    ):
        with pytest.raises(lq.LoopQError, match=words):
            program.export_gguf(tmp_path / "m.gguf", config=model.config.to_dict() | changed)
    with pytest.raises(lq.LoopQError, match=r"no config\.json"):
        program.export_gguf(tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_other_models_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, program = compiled()
    monkeypatch.setattr(get_state(program.graph_module), "model_name", "OuroForCausalLM")
    with pytest.raises(lq.LoopQError, match="OuroForCausalLM"):
        program.export_gguf(tmp_path / "m.gguf", config=model.config)
