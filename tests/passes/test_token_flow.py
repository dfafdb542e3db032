"""What mixes tokens is refused by one clear line; what does not gets a cache that changes nothing."""

from __future__ import annotations

import functools

import pytest
import torch

import loopq_compile as lq
from loopq_compile.capture import capture
from loopq_compile.passes.tag_loops import TagLoops
from loopq_compile.state import get_state
from tests.decoding import check_decoding, decode, ids
from tests.token_models import BAD, GOOD


@functools.cache
def captured(name: str) -> tuple[torch.nn.Module, lq.Program]:
    torch.manual_seed(0)
    model = (GOOD[name] if name in GOOD else BAD[name][0])().eval()
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


@pytest.mark.parametrize("name", BAD)
def test_refusals_say_why(name: str) -> None:
    with pytest.raises(lq.LoopQError, match=BAD[name][1]):
        captured(name)[1].with_cache()
