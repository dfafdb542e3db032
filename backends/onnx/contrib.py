"""Target `onnxruntime`: 4-bit and 8-bit products as `com.microsoft::MatMulNBits`, which multiplies packed weights.

The operator takes `[N, K]` weights in blocks of one scale, as unsigned codes around 8 (or 128), two 4-bit codes to the
byte. Weights that do not fit (blocks that are no power of two from 16 on) stay as target `qdq` has them.

At `accuracy_level` 4 ONNX Runtime multiplies integers and for that rounds activations to 8 bits per block once more;
so it is asked for only where activations are quantized already; elsewhere products are in single precision.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from loopq_compile.backends.onnx.emit import Emitter, constant, constant_array, sizes
from loopq_compile.backends.onnx.prepare import Origin
from loopq_compile.backends.onnx.qdq import lower_to_qdq
from loopq_compile.backends.onnx.translate import DOMAIN

CONTRIB = "com.microsoft"
SMALLEST_BLOCK = 16


def lower_to_contrib(model: ir.Model, origins: Mapping[str, Origin]) -> None:
    """Replaces the nodes of domain `loopq` in place, linear layers with fitting weights first.

    Raises:
        LoopQError: as in `lower_to_qdq`.
    """
    graph = model.graph
    linears = [node for node in graph if node.domain == DOMAIN and node.op_type == "Linear"]
    made = [_lower_linear(graph, node) for node in linears]
    if any(made):
        model.opset_imports[CONTRIB] = 1
    for op_type in ("Dequantize", "Row"):
        for node in [node for node in graph if node.domain == DOMAIN and node.op_type == op_type]:
            if not node.outputs[0].uses():
                graph.remove(node, safe=True)
    lower_to_qdq(model, origins)


def _lower_linear(graph: ir.Graph, node: ir.Node) -> bool:
    """Replaces `Linear(x, Dequantize(codes, scale), bias)`; False if its weight does not fit."""
    x, weight, *bias = node.inputs
    dequantize = weight.producer() if weight is not None else None
    if x is None or dequantize is None or dequantize.domain != DOMAIN or dequantize.op_type != "Dequantize":
        return False
    codes_value, codes, row = _stored(dequantize.inputs[0])
    scale_value, scale, _ = _stored(dequantize.inputs[1])
    if codes is None or scale is None or codes_value is None or scale_value is None:
        return False
    scale = np.broadcast_to(scale, (*codes.shape[:-1], scale.shape[-1]))
    outputs, features, groups = codes.shape[-2], codes.shape[-1], scale.shape[-1]
    block = features // groups
    if block < SMALLEST_BLOCK or block & (block - 1):
        return False
    bits = 4 if codes.min(initial=0) >= -8 and codes.max(initial=0) <= 7 else 8
    packed = constant(graph, f"{codes_value.name}.packed", _pack(codes, groups, bits))
    scales = constant(graph, f"{scale_value.name}.scales", scale)
    emitter = Emitter(graph, node)
    if row is not None:
        packed = emitter.node("Gather", [packed, row], packed.dtype, sizes(packed)[1:], {"axis": 0})
        scales = emitter.node("Gather", [scales, row], scales.dtype, sizes(scales)[1:], {"axis": 0})
    maker = x.producer()
    quantized = maker is not None and maker.domain == DOMAIN and maker.op_type == "Dequantize"
    attributes = {"K": features, "N": outputs, "bits": bits, "block_size": block}
    attributes["accuracy_level"] = 4 if quantized else 1
    result = node.outputs[0]
    y = emitter.node("MatMulNBits", [x, packed, scales], result.dtype, result.shape, attributes, domain=CONTRIB)
    if bias and bias[0] is not None:
        y = emitter.node("Add", [y, bias[0]], result.dtype, result.shape)
    emitter.finish(y)
    return True


def _stored(value: ir.Value | None) -> tuple[ir.Value | None, np.ndarray | None, ir.Value | None]:
    """The initializer behind `value`, its array, and the row of it that is read (None for all of it)."""
    node = value.producer() if value is not None else None
    if node is not None and node.domain == DOMAIN and node.op_type == "Row":
        return node.inputs[0], constant_array(node.inputs[0]), node.inputs[1]
    return value, constant_array(value), None


def _pack(codes: np.ndarray, groups: int, bits: int) -> np.ndarray:
    """Signed codes `[..., N, K]` as bytes `[..., N, groups, K / groups * bits / 8]`, earlier codes in low halves."""
    unsigned = (codes.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    if bits == 4:
        unsigned = unsigned[..., ::2] | (unsigned[..., 1::2] << 4)
    return unsigned.reshape(*codes.shape[:-1], groups, -1)
