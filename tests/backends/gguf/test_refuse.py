"""What llama.cpp cannot run is named, with the method or the scheme that fits."""

from __future__ import annotations

import copy
from typing import Any

import pytest

import loopq_compile as lq
from loopq_compile.backends.gguf.refuse import check_program
from loopq_compile.graph.state import get_tensor, set_tensor
from tests.tiny import tiny_model, tiny_program, tokens

PLAIN = "method='loopq-plain'"


def refusal(program: lq.Program) -> str:
    with pytest.raises(lq.LoopQError) as caught:
        check_program(program.graph_module)
    return str(caught.value)


@pytest.mark.parametrize(
    ("scheme", "words", "remedy"),
    [
        ("w4a4", "4-bit activations (layers.0", "'w4a8'"),
        (lq.Scheme(4, 16, group_size=16), "weights in groups of 16 (layers.0", "group_size=32"),
        (lq.Scheme(4, 8, group_size=-1), "activations in groups of 64 (layers.0", "group_size=32"),
    ],
)
def test_other_grids(scheme: Any, words: str, remedy: str) -> None:
    message = refusal(lq.compile(tiny_model(), tokens(), scheme=scheme, method="symmetric"))
    assert words in message and remedy in message


@pytest.mark.parametrize(
    ("options", "words", "remedy"),
    [
        ({"method": "smoothquant"}, "a transform of activations (layers.0", PLAIN),
        ({"method": lq.pipelines.loopq(slt=False, cta=False)}, "a transform of activations (layers.0", PLAIN),
        ({"method": lq.pipelines.loopq(transforms=False), "scheme": "w4a16"}, "an adapter between loops", PLAIN),
        ({"scheme": lq.Scheme(4, 8, activation="static")}, "static scales of activations (layers.0", "dynamic scales"),
    ],
)
def test_what_only_this_compiler_runs(options: dict[str, Any], words: str, remedy: str) -> None:
    whole = {"scheme": "w4a8", "method": "symmetric", "calibration": [tokens(1)]} | options
    steps = {"steps": 1} if isinstance(whole["method"], lq.Pipeline) else {}
    message = refusal(lq.compile(tiny_model(), tokens(), **whole, **steps))
    assert words in message and remedy in message


def test_ranges_and_caches() -> None:
    program = copy.deepcopy(tiny_program("w4a8", method="symmetric"))
    check_program(program.graph_module)
    assert "cache" in refusal(program.with_cache())
    name = next(str(n.target) for n in program.graph_module.graph.nodes if "activation_clip" in str(n.target))
    clip = get_tensor(program.graph_module, name)
    for rows, words in ((1, "clipped ranges of activations"), (3, "ranges per loop of activations")):
        set_tensor(program.graph_module, name, clip.repeat(rows, 1) * 0.9)
        message = refusal(program)
        assert words in message and PLAIN in message


def test_loopq_plain_is_accepted() -> None:
    batches = [tokens(seed) for seed in range(2)]
    program = lq.compile(tiny_model(), tokens(), scheme="w4a8", method="loopq-plain", calibration=batches, steps=2)
    check_program(program.graph_module)
    scales = [t for name, t in program.graph_module.named_buffers() if name.endswith("_scale")]
    assert scales and all((scale.half().float() == scale).all() for scale in scales)


def test_loopq_plain_knows_static_ranges() -> None:
    """Other engines run static scales, so the method must fill them, though llama.cpp takes none."""
    data = [tokens(seed) for seed in range(2)]
    scheme = lq.Scheme(4, 8, activation="static")
    program = lq.compile(tiny_model(), tokens(), scheme=scheme, method="loopq-plain", calibration=data, steps=2)
    tables = [value for name, value in program.graph_module.named_buffers() if "activation_scale" in name]
    assert tables and all((table < 0.5).all() and len(table) == 1 for table in tables)
    assert "static scales" in refusal(program)
