"""`first-loops` and `last-loops`: together they are the whole program; what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loopq_compile.errors import LoopQError
from loopq_compile.generation.text_reader import Part
from loopq_compile.graph.caches import cache_inputs, empty_cache, present_name
from loopq_compile.graph.texts import logits_of
from loopq_compile.passes.loops.first_loops import FirstLoops
from loopq_compile.passes.loops.last_loops import LastLoops
from loopq_compile.program import Program
from tests.decoding import captured, ids, ouro, quantized


def presents(result: dict[str, Tensor], part: Part) -> dict[str, Tensor]:
    return {name: result[present_name(name)] for name in part.axes}


def check(cached: Program, first: int) -> tuple[Part, Part]:
    """Four tokens behind a prompt of six: one by one through the first loops, together through the others."""
    whole = Part(cached.graph_module)
    head, rest = (Part(cached._rewritten([item(first)]).graph_module) for item in (FirstLoops, LastLoops))
    tokens = ids(1, 10)
    mask = torch.ones_like(tokens)
    empty = {spec.name: empty_cache(spec, 1, 1) for spec in cache_inputs(whole.signature)[2]}
    past = presents(whole(tokens[:, :6], mask[:, :6], empty), whole)
    expected = whole(tokens[:, 6:], mask, past)
    given, results = dict(past), []
    for at in range(6, 10):
        results.append(head(tokens[:, at : at + 1], mask[:, : at + 1], given))
        given.update(presents(results[-1], head))
    states = [torch.cat([result[name] for result in results], axis) for name, axis in rest.states.items()]
    found = rest(tokens[:, 6:], mask, past, states)
    assert set(head.axes) | set(rest.axes) == set(whole.axes)
    assert len(head.axes) < len(whole.axes) > len(rest.axes)
    torch.testing.assert_close(found["logits"], expected["logits"], rtol=1e-4, atol=1e-5)
    for name in whole.axes:
        ours = found.get(present_name(name), results[-1].get(present_name(name)))
        torch.testing.assert_close(ours, expected[present_name(name)], rtol=1e-4, atol=1e-5)
    return head, rest


@pytest.mark.parametrize(
    ("name", "first"),
    [("ouro", 1), ("ouro-mask", 2), ("loopformer", 2), ("parcae", 1), ("parcae", 2), ("huginn", 2), ("tiny", 1)],
)
def test_two_parts_are_the_whole(name: str, first: int) -> None:
    head, rest = check(captured(name)[1].with_cache(), first)
    shared = set(head.axes) & set(rest.axes)
    assert bool(shared) == (name in ("parcae", "huginn")), "layers after the loop are in both, others in one"


def test_an_injected_input_is_handed_over() -> None:
    _, rest = check(captured("huginn")[1].with_cache(), 1)
    assert len(rest.states) == 2, "the state, and the embedding that every loop adds again"


@pytest.mark.parametrize("bits", [8, 4])
def test_integer_caches(bits: int) -> None:
    check(quantized().with_cache(kv_bits=bits), 1)


def test_the_first_loops_and_the_head_are_a_shorter_model() -> None:
    """An Ouro of one loop, with the same weights, is what the first of three loops is."""
    torch.manual_seed(0)
    model = ouro().eval()
    model.loops = 1
    head = Part(captured("ouro")[1].with_cache()._rewritten([FirstLoops(1)]).graph_module)
    tokens = ids(1, 8)
    empty = {spec.name: empty_cache(spec, 1, 1) for spec in cache_inputs(head.signature)[2]}
    with torch.no_grad():
        expected = logits_of(model(tokens))
    torch.testing.assert_close(head(tokens, torch.ones_like(tokens), empty)["logits"], expected)


@pytest.mark.parametrize(
    ("make", "first", "reason"),
    [
        (lambda: captured("tiny")[1], 1, "with a key-value cache"),
        (lambda: captured("tiny")[1].with_cache(stacked=True), 1, "caches are stacked"),
        (lambda: captured("tiny")[1].with_cache(), 3, "choose 1 to 2"),
        (lambda: captured("exits")[1].with_early_exit(cache=True), 1, "early exit"),
    ],
    ids=["no cache", "stacked", "too many", "early exit"],
)
@pytest.mark.parametrize("item", [FirstLoops, LastLoops])
def test_what_is_refused(make, first: int, reason: str, item) -> None:
    with pytest.raises(LoopQError, match=reason):
        make()._rewritten([item(first)])
