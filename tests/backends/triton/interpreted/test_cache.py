"""`loopq_triton::quantize_cache` and `cached_attention` against their definitions: codes and scales to the last bit."""

import pytest
import torch

from loopq_compile.backends.triton import configurations
from loopq_compile.operators import ops
from tests.backends.triton.kernels import kernels

FORMS = [(8, 32, 32), (8, 64, 64), (8, 128, 128), (8, 33, 33), (4, 32, 32), (4, 64, 32), (4, 128, 32), (4, 96, 32)]
FORMS += [(4, 20, 20)]
"""Bits, size of a head, channels per scale, as in `CacheStore`; odd sizes included."""
TYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(x, bits, group_size):
    found, expected = kernels.quantize_cache(x, bits, group_size), ops.quantize_cache(x, bits, group_size)
    for part, right in zip(found, expected, strict=True):
        assert part.dtype == right.dtype and part.shape == right.shape
        assert torch.equal(part, right)
    return found


@pytest.mark.parametrize(("bits", "size", "group_size"), FORMS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_what_is_written_is_exact(bits, size, group_size, dtype):
    """Heads before tokens, as a view: the tensors that a model has there."""
    for batch, new, heads in ((1, 1, 2), (2, 7, 3)):
        x = random(batch, new, heads, size, seed=new, dtype=dtype).transpose(1, 2)
        assert same(x, bits, group_size)[0].is_contiguous()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_zeros_extremes_and_ties(bits, dtype):
    """All-zero tokens, huge and tiny ones, a single entry, both signs at the same magnitude, halves between codes."""
    x = torch.zeros(1, 1, 9, 64)
    largest = torch.finfo(dtype).max
    x[0, 0, 1] = random(64).clamp(-1, 1) * largest
    x[0, 0, 2] = random(64, seed=1) * torch.finfo(dtype).tiny * 4
    x[0, 0, 3, 5] = -3.0
    x[0, 0, 4, 40] = 3.0
    x[0, 0, 5, :] = 2.0
    x[0, 0, 6, ::2], x[0, 0, 6, 1::2] = 7.5, -7.5
    x[0, 0, 7] = torch.arange(-16, 16, 0.5)
    x[0, 0, 8] = torch.tensor(-0.0)
    codes, scale = same(x.to(dtype), bits, 32 if bits == 4 else 64)
    zero = 0 if bits == 8 else 8 + 16 * 8
    assert codes[0, 0, [0, 8]].eq(zero).all() and torch.isfinite(scale).all() and scale.ne(0).all()


def test_any_leading_dimensions_and_none_at_all():
    same(random(5, 64), 8, 64)
    same(random(2, 3, 64), 4, 32)
    same(random(2, 2, 0, 64), 8, 64)


def attention(q, k, v, mask, bits, group_size, value_group=None):
    stored = [*ops.quantize_cache(k, bits, group_size), *ops.quantize_cache(v, bits, value_group or group_size)]
    arguments = (q, *stored, mask, bits, q.shape[-1] ** -0.5)
    found, expected = kernels.cached_attention(*arguments), ops.cached_attention(*arguments)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert found.transpose(1, 2).is_contiguous() and expected.transpose(1, 2).is_contiguous()
    return found, expected


def near(found, expected):
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 0.02, torch.float16: 0.003}[found.dtype]
    assert found.isfinite().all()
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def causal(rows, total, dtype, padding=()):
    """`[batch, 1, rows, total]` as `add-cache` makes it: a token sees itself and earlier ones that are not padding."""
    query = torch.arange(total - rows, total)[:, None]
    seen = torch.arange(total) < query
    real = torch.stack([torch.arange(total) >= count for count in padding or (0, 0)])
    shown = (seen & real[:, None, None]) | (torch.arange(total) == query)
    return (shown.to(dtype) - 1) * torch.finfo(dtype).max


@pytest.mark.parametrize(("bits", "size", "group_size"), FORMS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_attention_of_one_token(bits, size, group_size, dtype):
    """Lengths of one column, and lengths that fill no tile; grouped queries; padding on the left."""
    for total, repeat in ((1, 1), (37, 3)):
        q = random(2, 1, 2 * repeat, size, dtype=dtype).transpose(1, 2)
        k, v = (random(2, 2, total, size, seed=seed, dtype=dtype) for seed in (1, 2))
        near(*attention(q, k, v, causal(1, total, dtype, (0, total // 2)), bits, group_size))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("rows", "repeat"), [(3, 1), (5, 2), (16, 3)])
def test_attention_of_several_tokens(bits, rows, repeat):
    """More queries than a program takes; the first rows of the second text are padding, and see only themselves."""
    q = random(2, rows, 2 * repeat, 32).transpose(1, 2)
    k, v = (random(2, 2, rows + 9, 32, seed=seed) for seed in (1, 2))
    near(*attention(q, k, v, causal(rows, rows + 9, q.dtype, (0, 12)), bits, 32))


def test_rows_that_see_nothing_have_equal_weights():
    """A padded query under a finite mask: the definition gives the mean of all values, not NaN."""
    q, k, v = random(1, 2, 3, 32), random(1, 2, 50, 32, seed=1), random(1, 2, 50, 32, seed=2)
    mask = torch.full((1, 1, 3, 50), torch.finfo(torch.float32).min)
    mask[:, :, 2, 7] = 0
    found, expected = attention(q, k, v, mask, 8, 32)
    near(found, expected)
    restored = ops.dequantize_cache(*ops.quantize_cache(v, 8, 32), 8)
    torch.testing.assert_close(found[:, :, 0], restored.mean(2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[:, :, 2], restored[:, :, 7])


def test_masks_of_minus_infinity_hide_whole_tiles():
    q, k, v = random(1, 2, 1, 32), random(1, 2, 200, 32, seed=1), random(1, 2, 200, 32, seed=2)
    mask = torch.full((1, 1, 1, 200), float("-inf"))
    mask[..., 150:] = 0
    near(*attention(q, k, v, mask, 4, 32))


def test_a_mask_and_sizes_of_its_own_for_every_head():
    q, k, v = random(2, 4, 2, 64), random(2, 2, 21, 64, seed=1), random(2, 2, 21, 48, seed=2)
    mask = random(2, 4, 2, 21, seed=3)
    near(*attention(q, k, v, mask, 4, 32, 48))


def test_large_scores_and_values_stay_finite():
    q, k = random(1, 1, 1, 64) * 1e4, random(1, 1, 40, 64, seed=1) * 1e4
    near(*attention(q, k, random(1, 1, 40, 64, seed=2) * 1e30, torch.zeros(1, 1, 1, 40), 8, 64))


def test_the_length_is_cut_into_parts(monkeypatch):
    """One, two, eight programs for a head, and parts without columns."""
    q, k, v = random(1, 3, 1, 32), random(1, 1, 333, 32, seed=1), random(1, 1, 333, 32, seed=2)
    mask = causal(1, 333, q.dtype, (100,))
    assert configurations.attention_parts(1, 333) == 2
    found = []
    for parts in (1, 2, 8, 32):
        monkeypatch.setattr("loopq_compile.backends.triton.operators.attention_parts", lambda *_, n=parts: n)
        found.append(attention(q, k, v, mask, 4, 32)[0])
        near(*attention(q, k, v, mask, 4, 32))
    assert configurations.attention_parts(300, 1 << 20) == 1
    assert configurations.attention_parts(16, 1 << 20) == 32


@pytest.mark.parametrize("parts", [1, 8])
def test_columns_behind_the_last_are_not_read(parts, monkeypatch):
    """A cache with room for more: NaN and huge codes after the position, which the mask hides as well."""
    monkeypatch.setattr("loopq_compile.backends.triton.operators.attention_parts", lambda *_: parts)
    q = random(2, 3, 1, 32)
    k, v = (random(2, 3, 200, 32, seed=seed) for seed in (1, 2))
    stored = [*ops.quantize_cache(k, 8, 32), *ops.quantize_cache(v, 8, 32)]
    for last in (0, 63, 64, 130, 199):
        spoiled = [part.clone() for part in stored]
        for part in spoiled:
            part[:, :, last + 1 :] = 127 if part.dtype is torch.int8 else float("nan")
        mask = torch.where(torch.arange(200) <= last, 0.0, float("-inf"))[None, None, None]
        found = kernels.cached_attention(q, *spoiled, mask, 8, 0.2, torch.tensor([last]))
        near(found, ops.cached_attention(q, *stored, mask, 8, 0.2))


def test_long_prompts_take_the_definition(monkeypatch):
    monkeypatch.setattr("loopq_compile.backends.triton.operators.launcher", None)
    q = random(1, 2, 17, 32)
    near(*attention(q, random(1, 2, 17, 32), random(1, 2, 17, 32), causal(17, 17, q.dtype, (0,)), 8, 32))
