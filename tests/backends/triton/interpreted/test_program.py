"""Whole programs on kernels, in the interpreter, against the reference backend."""

import pytest

import loopq_compile as lq
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
    """A sum that differs in its last bit can turn a code, and later loops carry it on: see CONTRIBUTING."""
    program = compiled(method, scheme, activation)
    run = program.lower("triton")
    assert run.kernels
    names = [str(node.target) for node in run.graph_module.graph.nodes]
    assert any("loopq_triton.packed_linear" in name for name in names)
    assert not any(name.startswith(("loopq.quantize", "loopq.packed")) for name in names)
    for seed, batch, length in ((7, 2, 11), (8, 1, 1)):
        ids = tokens(seed, batch, length)
        found, expected = run(ids), program.lower("reference")(ids)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            difference = (found[key] - value).abs() / value.abs().max()
            assert difference.max() < 0.03 and difference.mean() < 0.003


def test_kernels_are_called(monkeypatch):
    """The comparison above would also pass on the definitions."""
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
