"""Whole programs on kernels, in the interpreter, against the reference backend."""

import pytest
import torch

import loopq_compile as lq
from loopq_compile.generation.decoders import CachedDecoder
from tests.backends.triton.kernels import here
from tests.tiny import tiny_model, tokens


def compiled(method, scheme, activation):
    data = [tokens(seed) for seed in range(3)]
    options = {"steps": 3} if method == "loopq" else {}
    return lq.compile(
        tiny_model(3), tokens(), scheme=scheme, method=method, activation=activation, calibration=data, **options
    )


@pytest.mark.parametrize(
    ("method", "scheme", "activation"),
    [
        ("loopq", "w4a4", "dynamic"),
        ("las", "w4a8", "static"),
        ("symmetric", "w8a8", "dynamic"),
    ],
)
def test_a_whole_program_equals_the_reference(method, scheme, activation):
    """A sum that differs in its last bit can round a code the other way, and later loops propagate this."""
    program = compiled(method, scheme, activation)
    run = program.lower("triton")
    assert run.kernels
    names = [str(node.target) for node in run.graph_module.graph.nodes]
    assert any("loopq_triton.packed_linear" in name for name in names)
    assert not any(name.startswith(("loopq.quantize", "loopq.packed")) for name in names)
    for seed, batch, length in ((7, 2, 11), (8, 1, 1)):
        ids = tokens(seed, batch, length)
        found, expected = here(run(ids)), program.lower("reference")(ids)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            difference = (found[key] - value).abs() / value.abs().max()
            assert difference.max() < 0.03 and difference.mean() < 0.003


def test_kernels_are_called(monkeypatch):
    """The comparison above would also pass if only definitions ran."""
    from loopq_compile.backends.triton import operators

    grids = []

    class Counting:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            grids.append(grid)
            return self.kernel[grid]

    monkeypatch.setattr(operators, "launcher", Counting)
    compiled("las", "w4a4", "dynamic").lower("triton")(tokens(1, 1, 4))
    assert len(grids) >= 3 * 4 * 2, "three loops, four groups, two kernels each"


@pytest.mark.parametrize(("bits", "rolled"), [(8, False), (4, True)])
def test_a_cache_of_integers_equals_the_reference(bits, rolled):
    """A prompt padded on the left, then token by token; caches of single loops and, if rolled, stacked ones."""
    program = compiled("las", "w8a8", "static").with_cache(last_token=True, kv_bits=bits, stacked=rolled)
    run = program.lower("triton", rolled=rolled)
    graphs = [m for m in run.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    names = [str(node.target) for graph_module in graphs for node in graph_module.graph.nodes]
    assert names.count("loopq_triton.cached_attention.default") == (1 if rolled else 3)
    assert names.count("loopq_triton.quantize_cache.default") == (2 if rolled else 6)
    assert not any(name.startswith(("loopq.quantize_cache", "loopq.dequantize")) for name in names)
    found, expected = CachedDecoder(run, run.signature, run.loops), program.decoder()
    ids, mask = tokens(4, 2, 8), torch.ones(2, 8, dtype=torch.int64)
    mask[1, :3] = 0
    for begin, end in ((0, 6), (6, 7), (7, 8)):
        y = expected(ids[:, begin:end], mask[:, :end])
        difference = (here(found(ids[:, begin:end], mask[:, :end])) - y).abs() / y.abs().max()
        assert difference.max() < 0.03 and difference.mean() < 0.003
    past = here(found.past)
    for name, right in expected.past.items():
        assert past[name].shape == right.shape and past[name].dtype == right.dtype
        if right.dtype != torch.float32:
            assert (past[name] == right).float().mean() > 0.97
