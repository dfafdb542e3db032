"""Where a program is cut into blocks: at the residual stream, and at the same places in every loop."""

import pytest
import torch

import loopq_compile as lq
from loopq_compile.calibration.blocks import find_blocks
from loopq_compile.graph.state import copy_graph, get_state
from loopq_compile.passes.loops.tag_loops import TagLoops
from loopq_compile.passes.quantize.annotate_linears import AnnotateLinears
from loopq_compile.passes.quantize.canonicalize_linears import CanonicalizeLinears
from loopq_compile.pipeline import Pipeline
from tests import zoo
from tests.calibration.tools import captured, prepared
from tests.tiny import tokens


def blocks_of(graph_module):
    state = get_state(graph_module)
    sites = [site.name for site in state.sites.values() if site.reason is None]
    return find_blocks(graph_module, state.run.teacher, sites)


def edges(blocks):
    """By block, inputs (without sizes) and outputs of its calls."""
    return [
        [
            ([name for name in call.inputs if not name.startswith("sym_size")], list(call.outputs))
            for call in block.calls
        ]
        for block in blocks
    ]


def test_a_block_is_one_layer_in_all_loops():
    blocks = blocks_of(prepared(loops=3, layers=2, adapters=False))
    names = [{site.split(".")[1] for site in block.sites} for block in blocks]
    assert names == [{"0"}, {"1"}] and [len(block.sites) for block in blocks] == [7, 7]
    assert edges(blocks) == [
        [(["input_ids"], ["add_1"]), (["rms_norm_4"], ["add_5"]), (["rms_norm_9"], ["add_9"])],
        [(["add_1"], ["rms_norm_4"]), (["add_5"], ["rms_norm_9"]), (["add_9"], ["add_11"])],
    ], "layers meet at residual additions, loops at the norm between them, which belongs to the loop that ends"


def test_the_blocks_together_are_the_program():
    """Blocks, run one after the other on their own results, give the program's results."""
    graph_module = prepared(loops=2, layers=2, adapters=False)
    blocks = blocks_of(graph_module)
    known = {"input_ids": tokens(5), "sym_size": 2, "sym_size_1": 16}
    calls = [(call, block) for block in blocks for call in block.calls]
    with torch.no_grad():
        while calls:
            call, block = next(item for item in calls if all(name in known for name in item[0].inputs))
            calls.remove((call, block))
            constants = {n: _tensor(graph_module, t) for n, t in block.attributes.items()}
            prepare = block.prepare
            results = prepare.module(*[constants[name] for name in prepare.inputs])
            constants.update(zip(prepare.outputs, results, strict=True))
            arguments = [known[name] if name in call.inputs else constants[name] for name in call.segment.inputs]
            known.update(zip(call.outputs, call.segment.module(*arguments), strict=True))
        last = blocks[-1].calls[-1].outputs[0]
        normed = torch.nn.functional.rms_norm(known[last], [64], _tensor(graph_module, "norm.weight"))
        logits = normed @ _tensor(graph_module, "head.weight").t()
        torch.testing.assert_close(logits, graph_module(tokens(5))[0], rtol=1e-4, atol=1e-5)


def _tensor(graph_module, name):
    from loopq_compile.graph.state import get_tensor

    return get_tensor(graph_module, name)


def zoo_blocks(name):
    graph_module = copy_graph(zoo.tagged(name).graph_module)
    state = get_state(graph_module)
    state.scheme, state.run.teacher = lq.Scheme.parse("w4a4", group_size=-1), copy_graph(graph_module)
    Pipeline([TagLoops(), CanonicalizeLinears(), AnnotateLinears()]).run(graph_module)
    return blocks_of(graph_module)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("albert", [("block.up", "block.down")]),
        ("padded", [("layers.0.qkv", "layers.0.out", "layers.1.up", "layers.1.down")]),
        (
            "inject-concat",
            [("prelude.up", "prelude.down"), ("adapter", "core.up", "core.down"), ("coda.up", "coda.down")],
        ),
        ("nested-last", [("outer.before.up", "outer.before.down"), ("outer.inner.up", "outer.inner.down")]),
        ("two-loops", [("encoder.up", "encoder.down"), ("between.up", "between.down"), ("decoder.up", "decoder.down")]),
    ],
)
def test_other_shapes_of_loops(name, expected):
    blocks = zoo_blocks(name)
    assert [block.sites for block in blocks] == expected
    assert all(len(call.outputs) == 1 for block in blocks for call in block.calls)


def test_tables_and_masks_are_inputs_of_blocks():
    (block,) = zoo_blocks("rotary-once")
    assert set(block.calls[1].inputs) == {"triu", "cos", "sin", "add_3"}


def test_nothing_quantized_no_blocks():
    graph_module = copy_graph(captured(2))
    assert find_blocks(graph_module, graph_module, []) == []
