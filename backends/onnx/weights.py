"""Linear layers and their weights for target `qdq`.

A quantized weight arrives as `Dequantize(codes [N, K], scale [N, groups])`, read by the `Linear` of every loop. It
leaves as one INT4 or INT8 initializer `[K, N]` with block-wise scales and one `DequantizeLinear`. Between it and
`MatMul` there is a `Reshape` to the same shape, which costs nothing. Without it, ONNX Runtime would fuse a
`DequantizeLinear` with its only `MatMul` and round the activations to 8 bits, which no file asks for. Weights that stay
in floating point are transposed too, without a second copy: a tied weight, which an embedding also reads, stays and
gets a `Transpose` node that all loops share.
"""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np
import onnx_ir as ir

from loopq_compile.backends.onnx.emit import Emitter, constant, constant_array
from loopq_compile.errors import InternalError

TURNED = "loopq.turned"
"""Marks the `Transpose` after a quantized weight; linear layers look through it, so only other readers keep it."""


def lower_weight(graph: ir.Graph, node: ir.Node) -> None:
    """Replaces the `Dequantize` of a weight.

    Up to 4 bits are stored as INT4 (two codes a byte), 5 to 8 bits as INT8. With one group per row the scale is a
    plain per-channel one, `[N]`, which more runtimes read; otherwise it is `[groups, N]` with `block_size`.

    Raises:
        InternalError: the weight is not a matrix of constants.
    """
    codes_value, scale_value = node.inputs
    codes, scale = constant_array(codes_value), constant_array(scale_value)
    if codes is None or scale is None or codes.ndim != 2 or codes_value is None or scale_value is None:
        raise InternalError(f"Weight {node.inputs} of {node.name} is not a constant matrix with constant scales.")
    outputs, features = codes.shape
    scale = np.broadcast_to(scale, (outputs, scale.shape[-1]))
    groups = scale.shape[1]
    stored = ir.DataType.INT4 if (node.attributes["bits"].as_int() or _bits(codes)) <= 4 else ir.DataType.INT8
    numpy_type = ml_dtypes.int4 if stored is ir.DataType.INT4 else np.int8
    emitter = Emitter(graph, node)
    packed = constant(graph, f"{codes_value.name}.{stored.name.lower()}", codes.T.astype(numpy_type), stored)
    if groups == 1:
        scales = constant(graph, f"{scale_value.name}.per_channel", scale[:, 0])
        attributes = {"axis": 1}
    else:
        scales = constant(graph, f"{scale_value.name}.blocks", scale.T)
        attributes = {"axis": 0, "block_size": features // groups}
    weight = emitter.node("DequantizeLinear", [packed, scales], scale_value.dtype, [features, outputs], attributes)
    weight = emitter.reshape(weight, [features, outputs], 0)
    turned = emitter.node("Transpose", [weight], scale_value.dtype, [outputs, features], {"perm": [1, 0]})
    producer = turned.producer()
    assert producer is not None
    producer.metadata_props[TURNED] = "yes"
    emitter.finish(turned)


def lower_stacked_weight(graph: ir.Graph, node: ir.Node) -> None:
    """Replaces the `Dequantize` of a weight per loop, `Row(codes [T, N, K])`: the stack is dequantized once before the
    loop (ONNX cannot gather 4-bit integers), and the loop takes its row of `[T, K, N]`. Codes or scales that happen to
    be equal in all loops have no `Row`.
    """
    (codes_value, codes_row), (scale_value, scale_row) = map(_stack, node.inputs)
    codes, scale = constant_array(codes_value), constant_array(scale_value)
    row = codes_row or scale_row
    if codes is None or scale is None or codes_value is None or scale_value is None or row is None:
        raise InternalError(f"Weight {node.inputs} of {node.name} is not a stack of constants.")
    loops = len(codes) if codes_row else len(scale)
    outputs, features = codes.shape[-2:]
    codes = np.broadcast_to(codes, (loops, outputs, features))
    scale = np.broadcast_to(scale, (loops, outputs, scale.shape[-1]))
    stored = ir.DataType.INT4 if _bits(codes) <= 4 else ir.DataType.INT8
    numpy_type = ml_dtypes.int4 if stored is ir.DataType.INT4 else np.int8
    emitter = Emitter(graph, node)
    turned = codes.transpose(0, 2, 1).astype(numpy_type)
    packed = constant(graph, f"{codes_value.name}.{stored.name.lower()}", turned, stored)
    scales = constant(graph, f"{scale_value.name}.blocks", scale.transpose(0, 2, 1))
    attributes = {"axis": 1, "block_size": features // scale.shape[-1]}
    kind = scale_value.dtype
    weights = emitter.node("DequantizeLinear", [packed, scales], kind, [loops, features, outputs], attributes)
    weight = emitter.node("Gather", [weights, row.inputs[1]], kind, [features, outputs], {"axis": 0})  # type: ignore[list-item]
    turned_back = emitter.node("Transpose", [weight], kind, [outputs, features], {"perm": [1, 0]})
    producer = turned_back.producer()
    assert producer is not None
    producer.metadata_props[TURNED] = "yes"
    emitter.finish(turned_back)
    for row in (codes_row, scale_row):
        if row is not None and row.graph is not None and not row.outputs[0].uses():
            graph.remove(row, safe=True)


def _stack(value: ir.Value | None) -> tuple[ir.Value | None, ir.Node | None]:
    """The stack that `Row` reads, and that node; a value that all loops share is returned itself, without a node."""
    maker = value.producer() if value is not None else None
    return (maker.inputs[0], maker) if maker is not None and maker.op_type == "Row" else (value, None)


def multiply(graph: ir.Graph, nodes: Sequence[ir.Node]) -> None:
    """Replaces `Linear(x, weight [N, K], bias)` by `MatMul` and `Add`; `nodes` are all of them.

    Quantized weights must already be lowered: they are `[K, N]`, followed by a `Transpose` that is removed.
    """
    turned: dict[ir.Value, ir.Value] = {}
    for node in nodes:
        x, weight, *bias = node.inputs
        assert x is not None and weight is not None
        emitter = Emitter(graph, node)
        if weight not in turned:
            turned[weight] = _turn(emitter, weight)
        result = node.outputs[0]
        y = emitter.node("MatMul", [x, turned[weight]], result.dtype, result.shape)
        if bias and bias[0] is not None:
            y = emitter.node("Add", [y, bias[0]], result.dtype, result.shape)
        emitter.finish(y)


def _turn(emitter: Emitter, weight: ir.Value) -> ir.Value:
    """`weight [N, K]` as `[K, N]`."""
    maker = weight.producer()
    if maker is not None and maker.metadata_props.get(TURNED):
        source = maker.inputs[0]
        assert source is not None
        return source
    linear_only = all(reader.op_type == "Linear" and position == 1 for reader, position in weight.uses())
    values = constant_array(weight)
    if values is not None and linear_only:
        return constant(emitter.graph, f"{weight.name}.transposed", values.T)
    shape = list(reversed(list(weight.shape or ())))
    return emitter.node("Transpose", [weight], weight.dtype, shape, {"perm": [1, 0]})


def _bits(codes: np.ndarray) -> int:
    largest = max(int(codes.max(initial=0)), -int(codes.min(initial=0)) - 1, 1)
    return largest.bit_length() + 1
