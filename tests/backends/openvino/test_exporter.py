"""Exports for OpenVINO: the numbers are the program's, keys and values stay inside, and nothing is stored twice."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from typer.testing import CliRunner

import loopq_compile as lq
from loopq_compile.backends.openvino import OpenVinoExecutable
from loopq_compile.cli import app
from loopq_compile.generation.decoders import Decoder
from loopq_compile.graph.texts import logits_of
from tests.backends.gguf.files import looped_llama, save_tokenizer
from tests.decoding import captured, ids, left_padded, ouro

openvino = pytest.importorskip("openvino")


def compiled(scheme: str = "w4a16") -> lq.Program:
    return lq.compile(ouro().eval(), ids(2, 6), scheme=scheme, method="symmetric")


def exported(program: lq.Program, folder: Path, **options: Any) -> OpenVinoExecutable:
    program.export_openvino(folder, **options)
    return OpenVinoExecutable(folder, threads=1, exact=True)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def kinds(executable: OpenVinoExecutable) -> Counter[str]:
    nodes = executable.compiled.get_runtime_model().get_ops()
    return Counter(node.get_rt_info()["layerType"].value for node in nodes)


@pytest.mark.parametrize(
    ("scheme", "method", "options"),
    [
        ("w4a16", "symmetric", {}),
        ("w8a16", "symmetric", {"group_size": -1}),
        ("w4a4", "quarot", {"group_size": 16}),
        ("w4a8", "loopq", {"group_size": 16, "steps": 4}),
        ("w4a8", "las", {"activation": "static", "calibration": [ids(2, 8)]}),
    ],
)
def test_logits_are_those_of_the_program(scheme: str, method: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Weights in groups and rows, transforms, clip ratios and adapters of every loop, static scales."""
    calibration = {"calibration": [ids(2, 8, seed) for seed in range(4)]} if method == "loopq" else {}
    program = lq.compile(ouro().eval(), ids(2, 6), scheme=scheme, method=method, **options, **calibration)
    with torch.no_grad():
        expected = logits_of(program(ids(2, 9)))
    assert error(exported(program, tmp_path)(ids(2, 9)), expected) < 1e-5


@pytest.mark.parametrize("name", ["loopformer", "llama-eager", "parcae", "huginn", "nanbeige", "sliced", "exits"])
def test_other_models_decode_as_they_read(name: str, tmp_path: Path) -> None:
    """Learned positions, attention that a model spells out, states that are mixed, and a row with padding."""
    model, program = captured(name)
    decoder, tokens = exported(program, tmp_path).decoder(), ids()
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    given = torch.cat([decoder.read(tokens[:, a:b], mask[:, :b]) for a, b in ((0, 6), (6, 7), (7, 10))], 1)
    with torch.no_grad():
        whole, alone = logits_of(model(tokens)), logits_of(model(tokens[1:, 4:]))
    assert error(given[0], whole[0]) < 1e-5 and error(given[1, 4:], alone[0]) < 1e-5


def test_attention_is_one_step_with_its_cache(tmp_path: Path) -> None:
    """Three loops of two layers: six attentions and twelve caches, nothing copied for queries of a group."""
    executable = exported(compiled(), tmp_path)
    found = kinds(executable)
    assert found["ScaledDotProductAttention"] == found["RoPE"] / 2 == 6
    assert found["MemoryInput"] == found["MemoryOutput"] == 12
    assert not found["Softmax"] and not found["Tile"]
    assert executable.input_names == {"input_ids", "attention_mask", "beam_idx"}


def test_text_is_read_once_and_rows_may_be_padded(tmp_path: Path) -> None:
    program = compiled()
    executable, inputs = exported(program, tmp_path, last_token=True), left_padded()
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]

    def read(decoder: Decoder) -> Tensor:
        return torch.stack([decoder(tokens[:, a:b], mask[:, :b]) for a, b in ((0, 4), (4, 5), (5, 7))])

    with torch.no_grad():
        assert error(read(executable.decoder()), read(program.decoder())) < 1e-5
    assert torch.equal(executable.generate(tokens[:1], 6), program.generate(tokens[:1], 6))


def test_every_weight_is_stored_once_in_few_bits(tmp_path: Path) -> None:
    """Seven linears for each of two layers, of 4-bit integers; three loops read them."""
    program = compiled()
    report = program.export_openvino(tmp_path / "a")
    assert report.weights == {"i4": 14} and report.rounded_by_engine == 0
    head = program.export_openvino(tmp_path / "b", head_bits=8)
    assert head.weights == {"i4": 14, "i8": 1}
    half = program.export_openvino(tmp_path / "c", head_bits=8, float_bits=16)
    sizes = [x.path.with_suffix(".bin").stat().st_size for x in (half, head, report)]
    assert sizes == sorted(set(sizes))
    with torch.no_grad():
        expected = logits_of(program(ids(2, 9)))
    for folder, most in (("b", 0.02), ("c", 0.025)):
        assert error(OpenVinoExecutable(tmp_path / folder, exact=True)(ids(2, 9)), expected) < most


def test_tied_embeddings_are_the_integers_of_the_head(tmp_path: Path) -> None:
    model = looped_llama(tie_word_embeddings=True)
    program = lq.compile(model, scheme="w4a16", method="symmetric")
    report = program.export_openvino(tmp_path, head_bits=8, float_bits=16)
    assert report.weights == {"i4": 21, "i8": 1}
    tokens = ids(2, 9)
    with torch.no_grad():
        expected = logits_of(program(tokens))
    assert 1e-4 < error(OpenVinoExecutable(tmp_path, exact=True)(tokens), expected) < 0.05


def group(file: Path) -> str:
    """In groups of how many features OpenVINO is to round activations."""
    model = openvino.Core().read_model(str(file))
    return str(model.get_rt_info(["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"]).value)


def test_eight_bit_activations_are_left_to_the_engine(tmp_path: Path) -> None:
    program = compiled("w4a8")
    report = program.export_openvino(tmp_path)
    assert report.rounded_by_engine == 3 * 2 * 7
    assert "OpenVINO rounds the inputs of 42 linears to 8 bits itself" in str(report)
    assert group(report.path) == "32" and group(compiled().export_openvino(tmp_path / "a").path) == "0"


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    program = compiled()
    for wrong, message in (({"head_bits": 2}, "head_bits must be 4 or 8"), ({"float_bits": 8}, "16 or 32")):
        with pytest.raises(lq.LoopQError, match=message):
            program.export_openvino(tmp_path / "a", **wrong)
    large = ouro().eval()
    torch.nn.init.constant_(next(large.parameters()), 1e5)
    with pytest.raises(lq.LoopQError, match="too large for 16 bits"):
        lq.compile(large, ids(2, 6), scheme="w4a16", method="symmetric").export_openvino(tmp_path / "a", float_bits=16)
    with pytest.raises(lq.LoopQError, match="has a cache, or is rolled"):
        program.with_cache().export_openvino(tmp_path / "a")
    with pytest.raises(lq.LoopQError, match=r"There is no .*export --target openvino"):
        OpenVinoExecutable(tmp_path / "b")
    assert not (tmp_path / "a").exists()


def test_a_damaged_model_is_named(tmp_path: Path) -> None:
    compiled().export_openvino(tmp_path)
    file = tmp_path / "openvino_model.xml"
    file.write_text(file.read_text()[:2000])
    with pytest.raises(lq.LoopQError, match=r"cannot open .*openvino_model\.xml"):
        OpenVinoExecutable(tmp_path)


def test_the_command_writes_what_other_commands_read(tmp_path: Path) -> None:
    def run(*arguments: object, status: int = 0) -> str:
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert done.exit_code == status, done.output
        return done.output

    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    model = f"{tmp_path / 'model'}@1-1x2"
    run("compile", model, "--scheme", "w4a16", "--method", "symmetric", "--out", tmp_path / "program")
    export = ["export", tmp_path / "program", "--target", "openvino", "--out", tmp_path / "out"]
    report = json.loads(run(*export, "--head-bits", 8, "--json"))
    assert report["weights"] == {"i4": 14, "i8": 1}
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "llama"
    card = (tmp_path / "out/README.md").read_text()
    assert str(tmp_path) not in (tmp_path / "out/config.json").read_text() + card
    assert "OpenVinoExecutable" in card and "`symmetric`" in card
    made = json.loads(run("generate", tmp_path / "out", "--prompt", "again", "--max-new-tokens", 3, "--json"))
    assert len(made["tokens"]) == 3
    assert "a model for OpenVINO" in run("verify", tmp_path / "out")
    assert "--form goes with" in run(*export, "--form", "rolled", status=1)
    assert "is an exported file" in run("inspect", tmp_path / "out", status=1)
