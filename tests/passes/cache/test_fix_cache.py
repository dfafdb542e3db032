"""`fix-cache`: what it changes, that it does so once, and what it refuses."""

import pytest
import torch

import loopq_compile as lq
from loopq_compile.passes.cache.fix_cache import FixCache
from tests.decoding import captured

_aten = torch.ops.aten


def count(graph_module, target):
    return len(graph_module.graph.find_nodes(op="call_function", target=target))


@pytest.mark.parametrize(("stacked", "bits", "writes"), [(False, None, 6), (True, 8, 12)])
def test_caches_are_written_in_place_and_once(stacked, bits, writes):
    graph_module = captured("tiny")[1].with_cache(stacked=stacked, kv_bits=bits).graph_module
    assert FixCache()(graph_module).modified
    assert count(graph_module, _aten.index_copy_.default) == writes
    assert count(graph_module, _aten.arange.start) == 0
    assert [node.target for node in graph_module.graph.nodes if node.op == "placeholder"][-1] == "position"
    code = graph_module.code
    assert not FixCache()(graph_module).modified and graph_module.code == code


def test_other_uses_of_the_past_are_refused():
    graph_module = captured("tiny")[1].with_cache().graph_module
    past = next(node for node in graph_module.graph.nodes if node.name == "past_tokens")
    with graph_module.graph.inserting_after(past):
        graph_module.graph.call_function(_aten.zeros.default, ([past],))
    with pytest.raises(lq.LoopQError, match=r"does not know 'zeros.*number of past tokens"):
        FixCache()(graph_module)
