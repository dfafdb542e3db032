"""Bytes of block formats, as the package `gguf` reads them."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from loopq_compile.backends.gguf.blocks import q4_0, q6_k, q8_0


@pytest.mark.parametrize(("pack", "kind", "bits"), [(q4_0, "Q4_0", 4), (q8_0, "Q8_0", 8)])
def test_codes_come_back(pack, kind: str, bits: int) -> None:
    random = np.random.default_rng(0)
    codes = random.integers(-(1 << (bits - 1)), 1 << (bits - 1), (5, 96), dtype=np.int8)
    scale = random.normal(size=(5, 3)).astype(np.float16)  # of both signs
    read = dequantize(pack(codes, scale), GGMLQuantizationType[kind])
    np.testing.assert_array_equal(read, codes * np.repeat(scale.astype(np.float32), 32, axis=1))


def test_q6_k_is_near() -> None:
    weight = np.random.default_rng(0).normal(size=(4, 512)).astype(np.float32)
    weight[1] = 0
    weight[2, :256] *= 1e-3
    read = dequantize(q6_k(weight), GGMLQuantizationType.Q6_K)
    # Half a step of the largest of 16 over 32; scales of 8 bits move it a little.
    bound = np.abs(weight.reshape(-1, 16)).max(1, keepdims=True) / 32 * 0.75
    coarse = np.abs(weight.reshape(4, 2, 256)).max(-1).repeat(256).reshape(-1, 16) / 32 / 128 * 32
    assert (np.abs(read - weight).reshape(-1, 16) <= bound + coarse).all()
    assert (read[1] == 0).all()
    assert np.linalg.norm(read - weight) < 0.02 * np.linalg.norm(weight)
