"""Caches of 8 and 4 bits: the operators, programs and files."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import loopq_compile as lq
from loopq_compile.backends.onnx import OnnxExecutable, export
from loopq_compile.graph.state import get_state
from loopq_compile.operators import dequantize_cache, quantize_cache
from tests.decoding import captured, decode, ids, quantized


@pytest.mark.parametrize(("bits", "group"), [(8, 64), (8, 32), (4, 32), (4, 64)])
def test_codes_are_rounded_to_nearest(bits: int, group: int) -> None:
    x = torch.randn(2, 3, 5, 64, generator=torch.Generator().manual_seed(bits))
    codes, scale = quantize_cache(x, bits, group)
    grouped = x.numpy().reshape(2, 3, 5, -1, group)
    peak = np.take_along_axis(grouped, np.abs(grouped).argmax(-1)[..., None], -1)
    step = np.abs(peak) / 127 if bits == 8 else peak / -8
    expected = np.clip(np.rint(grouped / step), -127 if bits == 8 else -8, 127 if bits == 8 else 7).astype(int)
    stored = codes.numpy().astype(int)
    if bits == 4:
        assert codes.dtype == torch.uint8 and codes.shape[-1] == 32
        stored = np.concatenate([stored & 15, stored >> 4], -1) - 8
    np.testing.assert_array_equal(stored.reshape(expected.shape), expected)
    restored = dequantize_cache(codes, scale, bits).numpy().reshape(grouped.shape)
    np.testing.assert_allclose(restored, expected * step, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 4])
def test_zeros_stay_zeros(bits: int, dtype: torch.dtype) -> None:
    x = torch.zeros(2, 32, dtype=dtype)
    assert torch.equal(dequantize_cache(*quantize_cache(x, bits, 32), bits), x)


@pytest.mark.parametrize("bits", [8, 4])
def test_they_are_operators_of_pytorch(bits: int) -> None:
    x = torch.randn(2, 3, 8)
    torch.library.opcheck(torch.ops.loopq.quantize_cache.default, (x, bits, 8))
    stored = quantize_cache(x, bits, 8)
    torch.library.opcheck(torch.ops.loopq.dequantize_cache.default, (*stored, bits))
    query, parts = torch.randn(2, 6, 4, 8), [part[:, :, None].expand(-1, -1, 5, -1) for part in stored]
    arguments = (query, *parts, *parts, torch.zeros(2, 1, 4, 5), bits, 0.3)
    torch.library.opcheck(torch.ops.loopq.cached_attention.default, arguments)


@pytest.mark.parametrize(("name", "bits"), [("ouro", 8), ("llama-eager", 4)])
def test_a_prompt_gives_the_same_in_one_call_as_in_many(name: str, bits: int) -> None:
    _, program = captured(name)
    cached = program.with_cache(kv_bits=bits)
    signature = get_state(cached.graph_module).signature
    whole = cached(ids())["logits"]
    torch.testing.assert_close(
        decode(cached, signature, ids(), torch.ones_like(ids()), [5, 1, 1, 3]), whole, rtol=1e-4, atol=1e-4
    )
    exact = program.with_cache()(ids())["logits"]
    difference = float((whole - exact).abs().max() / exact.abs().max())
    assert 1e-5 < difference < (0.02 if bits == 8 else 0.4)


@pytest.mark.parametrize(("bits", "form", "target"), [(8, "rolled", "onnxruntime"), (4, "unrolled", "qdq")])
def test_files(bits: int, form: str, target: str, tmp_path) -> None:
    program = quantized()
    report = export(program.graph_module, tmp_path, target=target, form=form, cache=True, kv_bits=bits)
    run = OnnxExecutable(report.path, threads=1)
    cached = program.with_cache(kv_bits=bits)
    torch.testing.assert_close(run(ids())["logits"], cached(ids())["logits"], rtol=2e-2, atol=2e-2)
    loops = "loops, " if form == "rolled" else ""
    stored = "INT8[{}batch, 2, past, 16]" if bits == 8 else "UINT8[{}batch, 2, past, 8]"
    assert report.inputs[2] == f"past_key_values.0.key: {stored.format(loops)}"
    assert report.inputs[3] == f"past_key_values.0.key_scale: FLOAT[{loops}batch, 2, past, 1]"
    in_parts = decode(run, run.signature, ids(), torch.ones_like(ids()), [6, 1, 3])
    torch.testing.assert_close(in_parts, run(ids())["logits"], rtol=2e-2, atol=2e-2)
    assert torch.equal(run.generate(ids(2, 6), 5), cached.generate(ids(2, 6), 5))


def test_what_is_refused(tmp_path) -> None:
    _, program = captured("tiny")
    with pytest.raises(lq.LoopQError, match="kv_bits must be 8 or 4"):
        program.with_cache(kv_bits=3)
    with pytest.raises(lq.LoopQError, match="cache=True"):
        program.export_onnx(tmp_path, kv_bits=8)
