"""Models with shared layers as others wrote them: ALBERT and Zamba2 of transformers, PyTorch's own encoder layer.

Each is captured unchanged, its loop is found, its w4a4 program runs and is exported. The code of looped models that is
on no package index is checked by `tests/upstream/check.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from loopq_compile import LoopQError
from loopq_compile.backends.onnx import OnnxExecutable
from loopq_compile.capture.to_graph import capture
from loopq_compile.compiler import quantize
from loopq_compile.graph.scheme import Scheme
from loopq_compile.graph.texts import logits_of
from loopq_compile.methods import get_pipeline
from loopq_compile.program import Program
from tests.backends.onnx.graphs import in_float32
from tests.looped_models import UniversalTransformer, zamba2

SIZES = ((2, 11), (1, 1), (3, 30))


def ids(batch: int, length: int) -> Tensor:
    """Token ids `[batch, length]`."""
    return torch.randint(1, 64, (batch, length), generator=torch.Generator().manual_seed(length))


def exact_then_quantized(model: nn.Module, example: Any, **options: Any) -> Program:
    """The w4a4 program; checks that the captured program equals the model, and that the relative error is below 0.5."""
    graph_module = capture(model, example)
    expected = {}
    for size in SIZES:
        with torch.no_grad():
            expected[size] = logits_of(model(ids(*size), **options))
        found = logits_of(Program(graph_module)(ids(*size)))
        torch.testing.assert_close(found, expected[size], rtol=1e-5, atol=1e-5)
    program = quantize(graph_module, Scheme.parse("w4a4"), get_pipeline("symmetric"))
    for size in SIZES:
        distance = (logits_of(program(ids(*size))) - expected[size]).norm() / expected[size].norm()
        assert 1e-3 < distance < 0.5
    return program


def differences(program: Program, folder: Path, **options: Any) -> list[float]:
    """Of the logits of the exported file, in units of the largest logit."""
    return difference(OnnxExecutable(program.export_onnx(folder, **options).path, threads=1), program)


def difference(run: OnnxExecutable, program: Program) -> list[float]:
    """Of the logits of an exported file, at two sizes."""
    pairs = [(logits_of(run(ids(*size))), logits_of(program(ids(*size)))) for size in ((2, 11), (1, 20))]
    return [float((found - expected).abs().max() / expected.abs().max()) for found, expected in pairs]


def albert() -> nn.Module:
    """One layer, three times."""
    torch.manual_seed(0)
    config = transformers.AlbertConfig(
        vocab_size=64, embedding_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.AlbertForMaskedLM(config).eval()


def test_albert(tmp_path: Path) -> None:
    program = exact_then_quantized(albert(), None)
    assert program.loops.describe() == "3 x (albert.encoder.albert_layer_groups)"
    assert [tuple(site.weight.split(".")[-2:]) for site in program.loops.call_sites].count(("ffn", "weight")) == 1
    for form in ("unrolled", "rolled"):
        assert max(differences(program, tmp_path / form, form=form)) < 3e-2
        assert max(differences(program, tmp_path / f"fast-{form}", target="onnxruntime", form=form)) < 0.1
    with pytest.raises(LoopQError, match="lets tokens see later ones"):
        program.with_cache()


@pytest.fixture(scope="module")
def zamba2_program() -> Program:
    """Its scan works in chunks of 8 tokens; no length in the tests is a multiple of 8."""
    return exact_then_quantized(zamba2(8), None, use_cache=False)


@pytest.mark.nightly
def test_zamba2_and_onnx_runtimes_second_rounding(zamba2_program: Program, tmp_path: Path) -> None:
    """In w4a4 the fast file differs only because ONNX Runtime rounds 4-bit activations to 8 bits again.

    This moves an activation by up to 1/254 of the largest of its block. Relative noise of 4e-3 on the embeddings moves
    the program's own logits by the same amount: 3 % of the largest, 4 % in the mean.
    """
    path = zamba2_program.export_onnx(tmp_path, target="onnxruntime").path
    fast, exact = (difference(OnnxExecutable(file, threads=1), zamba2_program) for file in (path, in_float32(path)))
    assert max(exact) < 1e-5
    assert 1e-3 < max(fast) < 0.1


def test_zamba2(zamba2_program: Program, tmp_path: Path) -> None:
    program = zamba2_program
    loop = program.loops.main
    assert loop is not None and loop.count == 2
    assert {block.removeprefix("model.layers.0.shared_transformer.") for block in loop.blocks} == {
        "input_layernorm", "self_attn", "pre_ff_layernorm", "feed_forward.gate_up_proj", "feed_forward.down_proj",
    }  # fmt: skip
    assert not [site for site in loop.call_sites if "mamba" in site.weight]
    assert max(differences(program, tmp_path / "onnx")) < 3e-2
    given = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    assert torch.equal(program.as_hugging_face().generate(ids(2, 5), **given), program.generate(ids(2, 5), 3))
    with pytest.raises(LoopQError, match=r"loop 1 is not like the others.*use form='unrolled'"):
        program.export_onnx(tmp_path / "rolled", form="rolled")
    with pytest.raises(LoopQError, match=r"node 'conv1d' .* mixes tokens of the sequence"):
        program.with_cache()


def test_a_universal_transformer_of_pytorchs_own_layer(tmp_path: Path) -> None:
    program = exact_then_quantized(UniversalTransformer().eval(), ids(2, 11))
    assert program.loops.describe() == "3 x (time, layer)"
    assert len(program.loops.call_sites) >= 4
    for form in ("unrolled", "rolled"):
        assert max(differences(program, tmp_path / form, form=form)) < 3e-2


class Chunked(nn.Module):
    """Adds positions chunk by chunk, with a shortcut for inputs that fit into one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(64, 16), nn.Parameter(torch.randn(24, 16))
        self.config: Any = type("Config", (), {"vocab_size": 64, "chunk_size": 24})()

    def forward(self, input_ids: Tensor) -> Tensor:
        x, size = self.embed(input_ids), self.config.chunk_size
        if x.shape[1] <= size:
            return x + self.positions[: x.shape[1]]
        chunks = nn.functional.pad(x, (0, 0, 0, -x.shape[1] % size)).unflatten(1, (-1, size))
        return (chunks + self.positions).flatten(1, 2)[:, : x.shape[1]]


def test_models_that_work_in_chunks_need_an_example_longer_than_a_chunk() -> None:
    model = Chunked().eval()
    chosen, short = Program(capture(model)), Program(capture(model, ids(2, 11)))
    for length in (1, 24, 25, 60):
        torch.testing.assert_close(chosen(ids(2, length)), model(ids(2, length)))
    torch.testing.assert_close(short(ids(2, 24)), model(ids(2, 24)))
    with pytest.raises(
        LoopQError,
        match=r"sequence <= 24 does not hold.*test_public_models.*compile with an example of that size",
    ):
        short(ids(2, 25))
