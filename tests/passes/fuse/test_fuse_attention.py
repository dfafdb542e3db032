"""`fuse-attention`: what it changes, does not change, and reports."""

import pytest
import torch

from loopq_compile.graph.loops import get_tag
from loopq_compile.graph.rolled import rolled_loops
from loopq_compile.graph.state import get_state
from loopq_compile.operators import ops
from loopq_compile.passes.cache.attention import SDPA
from loopq_compile.passes.fuse.fuse_attention import FuseAttention
from loopq_compile.passes.fuse.fusion import RESULTS
from loopq_compile.passes.loops.roll_loops import RollLoops
from loopq_compile.pipeline import Pipeline
from tests.decoding import captured, decode, ids


def cached(name, **options):
    program = captured(name)[1].with_cache(**options)
    get_state(program.graph_module).results = {}  # copies of a program share these
    return program


def fused(name, bits=8, **options):
    graph_module = Pipeline([FuseAttention()]).run(cached(name, kv_bits=bits, **options).graph_module)
    return graph_module, get_state(graph_module).results.get(RESULTS, [])


def count(graph_module, target):
    return len(graph_module.graph.find_nodes(op="call_function", target=target))


@pytest.mark.parametrize(("name", "bits"), [("ouro-mask", 8), ("llama", 4)])
def test_it_reads_the_cache_and_computes_the_same(name, bits):
    """Fused attention with copied, shared or separate heads; masks of the model and of the pass."""
    graph_module, lines = fused(name, bits)
    attention = graph_module.graph.find_nodes(op="call_function", target=ops.cached_attention.default)
    assert lines and all(line["parts"] == (f"dequantize {bits}-bit keys and values", "attention") for line in lines)
    assert count(graph_module, SDPA) == count(graph_module, ops.dequantize_cache.default) == 0
    assert {get_tag(node).index[0] for node in attention if get_tag(node)} != {0}, "every loop keeps its tag"
    original = cached(name, kv_bits=bits)
    signature = get_state(graph_module).signature
    mask = torch.ones_like(ids())
    mask[1, :3] = 0
    steps = (signature, ids(), mask, [6, 1, 3])
    expected = decode(original, *steps)

    def run(**inputs):
        return signature.restore(graph_module(*signature.bind((), inputs)))

    torch.testing.assert_close(decode(run, *steps), expected, rtol=1e-4, atol=1e-4)


def test_a_second_run_changes_nothing():
    graph_module, _ = fused("tiny")
    before = graph_module.code
    assert not FuseAttention()(graph_module).modified and graph_module.code == before


def test_stacked_caches_are_rolled_behind_it():
    graph_module, _ = fused("tiny", 4, stacked=True)
    (loop,) = rolled_loops(Pipeline([RollLoops()]).run(graph_module))
    assert count(loop.body, ops.cached_attention.default) == 1
    assert count(loop.body, ops.quantize_cache.default) == 2


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("tiny", {"bits": None}, "its keys are cached in floating point"),
        ("llama-eager", {}, "its attention is spelled out as products and softmax"),
        ("sliced", {}, "its attention is spelled out as products and softmax"),
    ],
)
def test_what_it_leaves_alone_and_why(name, options, reason):
    graph_module, lines = fused(name, **options)
    assert lines and all(not line["parts"] and line["reason"] == reason for line in lines)
    assert count(graph_module, ops.cached_attention.default) == 0


def test_heads_that_are_too_wide():
    graph_module = cached("tiny", kv_bits=8).graph_module
    assert not FuseAttention(widest=63)(graph_module).modified
    reasons = {line["reason"] for line in get_state(graph_module).results[RESULTS]}
    assert reasons == {"heads of 16 numbers; a kernel holds 15"}


def test_a_step_between_cache_and_attention():
    graph_module = cached("tiny", kv_bits=8).graph_module
    first = graph_module.graph.find_nodes(op="call_function", target=SDPA)[0]
    with graph_module.graph.inserting_before(first):
        scaled = graph_module.graph.call_function(torch.ops.aten.mul.Tensor, (first.args[1], 2.0))
    first.replace_input_with(first.args[1], scaled)
    FuseAttention()(graph_module)
    lines = get_state(graph_module).results[RESULTS]
    assert [line["reason"] for line in lines] == ["aten.mul.Tensor stands between its keys and the cache", "", ""]


def test_a_program_without_a_cache_is_not_looked_at():
    plain = captured("tiny")[1].graph_module
    lines = len(get_state(plain).results.get(RESULTS, []))
    assert not FuseAttention()(plain).modified
    assert len(get_state(plain).results.get(RESULTS, [])) == lines
