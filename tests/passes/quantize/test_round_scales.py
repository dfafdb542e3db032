"""`round-scales`: float16 numbers, the same integers, and nothing on a second run."""

import copy

import pytest
import torch

import loopq_compile as lq
from loopq_compile.graph.state import get_tensor, set_tensor
from loopq_compile.operators import ops
from loopq_compile.passes.quantize.round_scales import RoundScales
from tests.passes.test_rewriting import nodes
from tests.tiny import tiny_program


def packed() -> lq.Program:
    return copy.deepcopy(tiny_program("w4a8", method="symmetric"))


def buffers(program: lq.Program) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in program.graph_module.named_buffers()}


def test_scales_become_float16_numbers_and_the_rest_stays():
    program = packed()
    before = buffers(program)
    assert RoundScales()(program.graph_module).modified
    scales = {node.args[1].target for node in nodes(program.graph_module, ops.dequantize.default)} & before.keys()
    assert scales
    for name, value in buffers(program).items():
        if name in scales:
            assert value.dtype == torch.float32 and torch.equal(value, before[name].half().float())
            assert not torch.equal(value, before[name])
        else:
            assert torch.equal(value, before[name]), name


def test_a_second_run_changes_nothing():
    program = packed()
    RoundScales()(program.graph_module)
    before = buffers(program)
    assert not RoundScales()(program.graph_module).modified
    assert all(torch.equal(value, before[name]) for name, value in buffers(program).items())


def test_scales_out_of_range():
    program = packed()
    name = next(name for name in buffers(program) if name.endswith("weight_scale"))
    scale = get_tensor(program.graph_module, name)
    tiny = scale.clone()
    tiny[0, 0] = 1e-9
    set_tensor(program.graph_module, name, tiny)
    RoundScales()(program.graph_module)
    assert get_tensor(program.graph_module, name)[0, 0] == 2**-24, "never zero"
    set_tensor(program.graph_module, name, scale * 1e9)
    with pytest.raises(lq.LoopQError, match="above 65504"):
        RoundScales()(program.graph_module)
