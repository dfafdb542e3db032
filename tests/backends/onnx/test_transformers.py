"""Attention, grouped queries, masks and Hugging Face's output classes."""

from __future__ import annotations

import pytest
import torch
import transformers

from loopq_compile.backends.onnx import OnnxExecutable, export
from tests.backends.onnx.graphs import captured, quantized


@pytest.fixture(scope="module")
def llama():
    """Two Llama layers, run twice: the same modules are at several positions of the list."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=80, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    layer = model.model.layers[0]
    model.model.layers = torch.nn.ModuleList([layer, layer])
    return model


def test_llama_with_a_padding_mask(llama, tmp_path) -> None:
    ids = torch.randint(0, 80, (2, 12), generator=torch.Generator().manual_seed(0))
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    graph_module = quantized(captured(llama, example), 8, 8, activation="dynamic")
    report = export(graph_module, tmp_path)
    run = OnnxExecutable(report.path, threads=1)
    assert run.input_names == ["input_ids", "attention_mask"]
    assert run.output_names == ["logits"]
    assert report.integer_weights == {"INT8": 7}
    for batch, length in ((3, 20), (1, 1)):
        ids = torch.randint(0, 80, (batch, length), generator=torch.Generator().manual_seed(length))
        mask = torch.ones_like(ids)
        mask[0, : length // 3] = 0
        result = run(input_ids=ids, attention_mask=mask)
        expected = graph_module(ids, mask)[0]
        assert type(result).__name__ == "CausalLMOutputWithPast"
        seen = mask.bool()
        difference = (result.logits - expected)[seen].abs()
        assert difference.max() < 3e-2 * expected.abs().max()
        assert difference.mean() < 3e-3 * expected.abs().mean()
