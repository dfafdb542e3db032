"""Two forms of one program in a file; the number of tokens of a call decides which one runs.

An `If` chooses. Tensors of both forms, such as embeddings, are in the file and in memory only once.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from loopq_compile.backends.onnx.emit import constant
from loopq_compile.errors import LoopQError

FEW_TOKENS = 3
"""Calls of up to this many tokens, summed over the rows of a batch, take the first form."""


def join(few: ir.Model, many: ir.Model) -> ir.Model:
    """Joins two models with the same inputs and outputs into one; the two are emptied.

    Args:
        few: runs for calls of up to `FEW_TOKENS` tokens.
        many: runs for all others.

    Raises:
        LoopQError: the first integer input is not `[batch, sequence]`, so the tokens of a call cannot be counted.
    """
    inputs = [_like(value) for value in few.graph.inputs]
    outputs = [_like(value) for value in few.graph.outputs]
    ids = next((value for value in inputs if value.dtype is ir.DataType.INT64 and _rank(value) == 2), None)
    if ids is None:
        raise LoopQError("products='both' counts the tokens of a call, and finds no integer input [batch, sequence].")
    opsets = {domain: max(m.opset_imports.get(domain, 1) for m in (few, many)) for domain in few.opset_imports}
    graph = ir.Graph(inputs, [], nodes=[], opset_imports={**many.opset_imports, **opsets})
    for model in (few, many):
        _move(model.graph, graph)
    count = ir.node("Size", [ids])
    several = ir.node("Greater", [count.outputs[0], constant(graph, "few_tokens", np.int64(FEW_TOKENS))])
    branches = {"then_branch": many.graph, "else_branch": few.graph}
    choice = ir.node("If", [several.outputs[0]], branches, outputs=outputs)
    count.outputs[0].type, several.outputs[0].type = (ir.TensorType(t) for t in (ir.DataType.INT64, ir.DataType.BOOL))
    count.outputs[0].shape = several.outputs[0].shape = ir.Shape([])
    graph.extend([count, several, choice])
    graph.outputs.extend(outputs)
    return ir.Model(graph, ir_version=few.ir_version)


def branches(graph: ir.Graph) -> list[ir.Graph]:
    """The forms that `join` put into `graph`."""
    return [attribute.as_graph() for node in graph if node.op_type == "If" for attribute in node.attributes.values()]


def _move(branch: ir.Graph, graph: ir.Graph) -> None:
    """Removes inputs and stored tensors from a branch of `graph`; of two equal tensors, the first stays."""
    given = {value.name: value for value in graph.inputs}
    for value in list(branch.inputs):
        ir.convenience.replace_all_uses_with(value, given[value.name])
    branch.inputs.clear()
    for name, value in list(branch.initializers.items()):
        del branch.initializers[name]
        there = graph.initializers.get(name)
        if there is None:
            graph.register_initializer(value)
        elif _same(there, value):
            ir.convenience.replace_all_uses_with(value, there)
        else:
            value.name = f"{name}.{len(graph.initializers)}"
            graph.register_initializer(value)
    for value in branch.outputs:
        value.name = f"{value.name}.of_branch"  # the result of the file has the name itself


def _same(one: ir.Value, other: ir.Value) -> bool:
    a, b = one.const_value, other.const_value
    if a is None or b is None:
        return False
    return a is b or (a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a.numpy(), b.numpy()))


def _like(value: ir.Value) -> ir.Value:
    return ir.Value(name=value.name, type=value.type, shape=value.shape)


def _rank(value: ir.Value) -> int:
    return -1 if value.shape is None else len(value.shape)
