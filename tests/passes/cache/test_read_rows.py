"""`read-rows`: several tokens in a call give bit for bit what they give one by one."""

from __future__ import annotations

import torch

from loopq_compile.generation.text_reader import Part
from loopq_compile.graph.caches import cache_inputs, empty_cache, present_name
from loopq_compile.passes.cache.read_rows import ByRow, ReadRows
from loopq_compile.program import Program
from tests.decoding import captured, ids, quantized


def test_bit_for_bit() -> None:
    cached = quantized("w4a8").with_cache()
    rows = cached._rewritten([ReadRows()])
    plain, wide = Part(cached.graph_module), Part(rows.graph_module)
    tokens = ids(1, 12)
    mask = torch.ones_like(tokens)
    past = {spec.name: empty_cache(spec, 1, 1) for spec in cache_inputs(plain.signature)[2]}
    past = {n: plain(tokens[:, :4], mask[:, :4], past)[present_name(n)] for n in past}
    together, logits = wide(tokens[:, 4:], mask, past), []
    for at in range(4, 12):
        result = plain(tokens[:, at : at + 1], mask[:, : at + 1], past)
        past = {name: result[present_name(name)] for name in past}
        logits.append(result["logits"])
    assert torch.equal(together["logits"], torch.cat(logits, 1))
    assert all(torch.equal(together[present_name(name)], cache) for name, cache in past.items())


def test_programs_that_do_not_round_stay_as_they_are() -> None:
    cached = captured("tiny")[1].with_cache()
    unchanged = cached._rewritten([ReadRows()])
    assert not unchanged.log[-1].modified
    assert not _by_row(unchanged)


def test_a_second_run_changes_nothing() -> None:
    rows = quantized("w4a8").with_cache()._rewritten([ReadRows()])
    count = len(_by_row(rows))
    assert count and len(_by_row(rows._rewritten([ReadRows()]))) == count


def _by_row(program: Program) -> list[object]:
    return [node for node in program.graph_module.graph.nodes if isinstance(node.target, ByRow)]
