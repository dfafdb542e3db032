"""Streaming statistics and the ranges derived from them."""

import pytest
import torch

from loopq_compile.calibration.ranges import CLIP_RATIOS, Statistics, dynamic_clip, static_range, weight_scale
from loopq_compile.graph.scheme import quantized_range


def sample(seed, rows=400, width=64, tail=0.0):
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    x[0, 0] += tail
    return x


def measured(*parts, group=32, bits=4):
    statistics = Statistics.empty(parts[0].shape[-1] // group)
    for part in parts:
        statistics.update(part, group, bits, 2 ** (bits - 1) - 1)
    return statistics


def test_batches_merge_to_the_statistics_of_all():
    first, second = (sample(seed).flatten(0, -2)[:128] for seed in (0, 1))
    whole = measured(torch.cat([first, second]))
    for other in (measured(first, second), measured(first).merged(measured(second))):
        assert torch.equal(other.largest, whole.largest)
        assert torch.equal(other.counts, whole.counts)
        torch.testing.assert_close(other.clip_errors, whole.clip_errors)
        assert other.tokens == whole.tokens


def test_memory_does_not_grow_with_the_number_of_batches():
    statistics = measured(sample(0))
    before = statistics.counts.numel() + statistics.clip_errors.numel()
    for seed in range(5):
        statistics.update(sample(seed), 32, 4, -8)
    assert statistics.counts.numel() + statistics.clip_errors.numel() == before


def test_minmax_range_is_the_largest_magnitude():
    x = sample(0, tail=50.0)
    torch.testing.assert_close(static_range(measured(x), 4, "minmax", 99), x.view(-1, 2, 32).abs().amax((0, 2)))


def test_percentile_range_leaves_out_the_share_beyond_it():
    x = sample(0, tail=50.0)
    alpha = static_range(measured(x), 4, "percentile", 99.0)
    share = (x.view(-1, 2, 32).abs() <= alpha.view(1, 2, 1)).float().mean((0, 2))
    assert (share >= 0.99).all() and (share < 0.996).all()


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_mse_range_is_nearly_as_good_as_an_exhaustive_search(bits):
    x = sample(3, tail=30.0)
    low, high = quantized_range(bits)

    def error(alpha):
        scale = alpha / high
        return ((x[:, :32] / scale).round().clamp(low, high) * scale - x[:, :32]).square().sum()

    found = error(static_range(measured(x, bits=bits), bits, "mse", 99)[0])
    best = min(error(torch.tensor(alpha)) for alpha in torch.linspace(0.5, 31.0, 600).tolist())
    assert found <= 1.1 * best


def test_dynamic_clip_minimises_the_rounding_error():
    x = sample(4, rows=1000)
    statistics = measured(x, bits=3)
    clip = dynamic_clip(statistics)
    index = CLIP_RATIOS.index(pytest.approx(float(clip[0])))
    assert statistics.clip_errors[index, 0] == statistics.clip_errors[:, 0].min()
    assert (clip < 1).all(), "at 3 bits, clipping normal data pays"


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mse_weight_scales_are_never_worse_than_minmax(bits, signed):
    weight = sample(5, rows=16, width=64)
    low, high = quantized_range(bits)
    limit = low if signed else high
    errors = {}
    for method in ("minmax", "mse"):
        scale = weight_scale(weight, 32, bits, method, limit).unsqueeze(-1)
        groups = weight.view(16, 2, 32)
        errors[method] = ((groups / scale).round().clamp(low, high) * scale - groups).square().sum(-1)
    assert (errors["mse"] <= errors["minmax"] + 1e-6).all()
    assert errors["mse"].sum() < errors["minmax"].sum() or bits == 8


@pytest.mark.parametrize(("bits", "share"), [(3, 0.85), (4, 0.9), (8, 1.01)])
def test_signed_scales_make_smaller_errors(bits, share):
    weight = sample(5, rows=64, width=64)
    low, high = quantized_range(bits)
    groups = weight.view(64, 2, 32)
    errors = []
    for limit in (high, low):
        scale = weight_scale(weight, 32, bits, "mse", limit).unsqueeze(-1)
        errors.append(((groups / scale).round().clamp(low, high) * scale - groups).square().sum())
    assert errors[1] < share * errors[0]


def test_zero_weights_get_a_positive_scale():
    assert all((weight_scale(torch.zeros(4, 64), 32, 4, "mse", limit) > 0).all() for limit in (7, -8))
