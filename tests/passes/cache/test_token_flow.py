"""Models that mix tokens are refused with one clear line; others get a cache that changes nothing."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

import loopq_compile as lq
from loopq_compile.backends.onnx import OnnxExecutable, export
from loopq_compile.capture.to_graph import capture
from loopq_compile.graph.state import get_state
from loopq_compile.passes.loops.tag_loops import TagLoops
from tests.decoding import check_decoding, decode, ids
from tests.token_models import BAD, GOOD, ORDERS


@functools.cache
def captured(name: str) -> tuple[torch.nn.Module, lq.Program]:
    torch.manual_seed(0)
    model = (GOOD | ORDERS)[name]().eval() if name not in BAD else BAD[name][0]().eval()
    graph_module = capture(model, ids())
    TagLoops()(graph_module)
    graph_module.recompile()
    return model, lq.Program(graph_module)


@pytest.mark.parametrize("name", GOOD)
def test_decoding_equals_recomputation(name: str) -> None:
    model, program = captured(name)
    cached = program.with_cache()
    signature = get_state(cached.graph_module).signature
    tokens, padded = ids(), torch.ones_like(ids())
    padded[1, :4] = 0
    with torch.no_grad():
        whole, alone = model(tokens), model(tokens[1:, 4:])
    if whole.shape[1] > 1:
        check_decoding(model, cached, signature)
    last = decode(cached, signature, tokens, padded, [6, 1, 3])[:, -1]
    torch.testing.assert_close(last, torch.cat([whole[:1, -1], alone[:, -1]]), rtol=1e-4, atol=1e-4)
    steps = tokens
    for _ in range(3):
        with torch.no_grad():
            steps = torch.cat([steps, model(steps)[:, -1].argmax(-1, keepdim=True)], 1)
    assert program.generate(tokens, 3).equal(steps)


@pytest.mark.parametrize("name", ORDERS)
def test_orders_of_layers(name: str) -> None:
    model, program = captured(name)
    cached = program.with_cache()
    check_decoding(model, cached, get_state(cached.graph_module).signature)
    if name == "shared":
        assert len(get_state(cached.graph_module).signature.inputs) == 2 + 2 * 2  # one pair for each layer


@pytest.mark.parametrize("name", ["each layer", "start", "cast"])
def test_rolled_files(name: str, tmp_path: Path) -> None:
    model, program = captured(name)
    report = export(program.graph_module, tmp_path, form="rolled", target="onnxruntime", cache=True)
    run = OnnxExecutable(report.path, threads=1)
    check_decoding(model, run, run.signature, tolerance=1e-4)
    if name == "each layer":
        assert report.inputs[4] == "past_key_values.1.key: FLOAT[2, batch, 4, past, 8]"


@pytest.mark.parametrize("name", ["skips", "joined"])
def test_orders_that_cannot_be_rolled_are_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(lq.LoopQError, match="form='unrolled'"):
        export(captured(name)[1].graph_module, tmp_path, form="rolled", cache=True)


@pytest.mark.parametrize("name", BAD)
def test_refusals_say_why(name: str) -> None:
    with pytest.raises(lq.LoopQError, match=BAD[name][1]):
        captured(name)[1].with_cache()
