"""Bytes of llama.cpp's block formats.

Q4_0 and Q8_0 are a float16 scale `d` and 32 integers, and stand for `d * code`: exactly our groups of 32. Q4_0 stores
`code + 8`, entries `j` and `j + 16` in one byte. Q6_K holds 256 weights: 16 scales of 8 bits for 16 weights each, times
one float16 scale. `gguf.quants` reads all three and writes the first two from floating point; codes that exist already
are written here, so that nothing is rounded twice.
"""

from __future__ import annotations

import numpy as np

BLOCK, SUPER_BLOCK = 32, 256
_SMALLEST = np.float32(1e-30)


def q4_0(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Codes `[N, K]` in -8..7 and float16 scales `[N, K / 32]` as bytes `[N, K / 32 * 18]`."""
    raised = (codes.astype(np.int16) + 8).astype(np.uint8).reshape(len(codes), -1, 2, BLOCK // 2)
    return _with_scales(raised[:, :, 0] | (raised[:, :, 1] << 4), scale)


def q8_0(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Codes `[N, K]`, int8, and float16 scales `[N, K / 32]` as bytes `[N, K / 32 * 34]`."""
    return _with_scales(codes.astype(np.int8).view(np.uint8).reshape(len(codes), -1, BLOCK), scale)


def _with_scales(blocks: np.ndarray, scale: np.ndarray) -> np.ndarray:
    heads = np.ascontiguousarray(scale, dtype=np.float16).view(np.uint8).reshape(*blocks.shape[:2], 2)
    return np.concatenate([heads, blocks], axis=-1).reshape(len(blocks), -1)


def q6_k(weight: np.ndarray) -> np.ndarray:
    """Rounds float32 `[N, K]`, K a multiple of 256, to nearest; bytes `[N, K / 256 * 210]`.

    The largest entry of 16 becomes -32, as in Q4_0; llama.cpp's own writer searches further for better scales.
    """
    groups = weight.astype(np.float32).reshape(-1, 16, 16)
    index = np.abs(groups).argmax(-1, keepdims=True)
    wanted = np.take_along_axis(groups, index, -1)[..., 0] / np.float32(-32)
    largest = np.take_along_axis(wanted, np.abs(wanted).argmax(-1, keepdims=True), -1)
    d = (largest / np.float32(-128)).astype(np.float16)
    outer = d.astype(np.float32)
    scales = np.rint(wanted / np.where(outer == 0, _SMALLEST, outer)).clip(-128, 127)
    steps = (scales * outer)[..., None]
    codes = np.rint(groups / np.where(steps == 0, _SMALLEST, steps)).clip(-32, 31)
    raised = (np.where(steps == 0, 0, codes) + 32).astype(np.uint8)
    # Halves of 128 weights, each four runs of 32: two runs share bytes of low bits, all four share bytes of high bits.
    runs = raised.reshape(-1, 2, 4, 32)
    low = np.concatenate([(runs[:, :, i] & 15) | ((runs[:, :, i + 2] & 15) << 4) for i in (0, 1)], axis=-1)
    high = sum((runs[:, :, i] >> 4) << np.uint8(2 * i) for i in range(4))
    parts = [low.reshape(len(d), -1), np.asarray(high, np.uint8).reshape(len(d), -1)]
    parts += [scales.astype(np.int8).view(np.uint8), d.view(np.uint8)]
    return np.concatenate(parts, axis=-1).reshape(len(weight), -1)
