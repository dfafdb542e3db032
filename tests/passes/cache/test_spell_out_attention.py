"""`spell-out-attention`: equal results, no copies of the cache, and what it does not change."""

from __future__ import annotations

import pytest
import torch

from loopq_compile.graph.state import attach_state, copy_graph, get_state
from loopq_compile.graph.verify import verify_tags
from loopq_compile.passes.cache.attention import SDPA
from loopq_compile.passes.cache.spell_out_attention import SpellOutAttention
from loopq_compile.program import Program
from tests.decoding import captured, check_decoding


def count(program: Program, target: object) -> int:
    return sum(node.target is target for node in program.graph_module.graph.nodes)


@pytest.mark.parametrize("name", ["ouro", "llama-mask", "tiny"])
def test_grouped_queries_read_the_cache_without_copies(name: str) -> None:
    model, program = captured(name)
    cached = program.with_cache()
    assert SpellOutAttention()(cached.graph_module).modified
    cached.graph_module.recompile()
    verify_tags(cached.graph_module)
    assert count(cached, SDPA) == 0
    assert count(cached, torch.ops.aten.repeat_interleave.self_int) == 0
    for node in cached.graph_module.graph.nodes:
        if node.target is torch.ops.aten.expand.default:
            assert "present" not in str(node.args[0].args)
    check_decoding(model, cached, get_state(cached.graph_module).signature)
    assert not SpellOutAttention()(cached.graph_module).modified


def test_attention_without_a_mask_stays() -> None:
    _, program = captured("tiny")
    copied = copy_graph(program.graph_module)
    attach_state(copied, get_state(program.graph_module))
    assert not SpellOutAttention()(copied).modified
    assert count(Program(copied), SDPA) == count(program, SDPA) > 0
