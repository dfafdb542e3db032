"""What the opaque nodes of a translated program become in OpenVINO.

A weight is a constant of 4-bit or 8-bit integers `[N, groups, size]`, converted, times its scales, reshaped to
`[N, K]`. In this form OpenVINO keeps the integers and multiplies by them. Attention is `ScaledDotProductAttention`.
Keys that queries of a group share are broadcast as OpenVINO's own converters do it, since its fusions look for that.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from loopq_compile.backends.onnx.flatten import DOMAIN
from loopq_compile.backends.onnx.storage import half_of
from loopq_compile.errors import InternalError

_SMALL = 64
"""Bytes of constants that stay as they are."""


def extensions() -> list[Any]:
    """Conversions for `openvino.Core.add_extension`."""
    from openvino.frontend.onnx import ConversionExtension

    makers = {"Dequantize": _weight, "Linear": _linear, "Attention": _attention}
    return [ConversionExtension(name, DOMAIN, make) for name, make in makers.items()]


def _weight(node: Any) -> list[Any]:
    """`Dequantize(codes [N, K], scale [N, groups])`."""
    from openvino import opset13 as ops

    codes, scale = _data(node.get_input(0)), _data(node.get_input(1))
    outputs, features = codes.shape
    groups = scale.shape[-1]
    scale = np.broadcast_to(scale, (outputs, groups))[..., None]
    grouped = codes.reshape(outputs, groups, features // groups)
    values = ops.multiply(ops.convert(_integers(grouped), "f32"), ops.constant(np.ascontiguousarray(scale)))
    return [ops.reshape(values, np.array([outputs, features]), special_zero=False).output(0)]


def _integers(codes: np.ndarray) -> Any:
    """A constant of signed integers in the fewest bits that OpenVINO multiplies by."""
    from openvino import Type
    from openvino import opset13 as ops

    small = codes.min(initial=0) >= -8 and codes.max(initial=0) <= 7
    return ops.constant(codes, dtype=Type.i4 if small else Type.i8)


def _linear(node: Any) -> list[Any]:
    """`Linear(x, weight [N, K], bias)`."""
    from openvino import opset13 as ops

    result = ops.matmul(node.get_input(0), node.get_input(1), transpose_a=False, transpose_b=True)
    if node.get_input_size() > 2:
        result = ops.add(result, node.get_input(2))
    return [result.output(0)]


def _attention(node: Any) -> list[Any]:
    """`Attention(query [batch, heads, new, size], key [batch, groups, total, size], value, mask)`."""
    from openvino import opset13 as ops

    query, key, value, mask = (node.get_input(number) for number in range(4))
    heads, groups = (x.get_partial_shape()[1].get_length() for x in (query, key))
    key, value = (_repeated(x, heads // groups, heads) for x in (key, value))
    scale = ops.constant(np.array(node.get_attribute("scale"), np.float32))
    return [ops.scaled_dot_product_attention(query, key, value, mask, scale).output(0)]


def _repeated(x: Any, times: int, heads: int) -> Any:
    """Keys or values `[batch, groups, total, size]`, once for each of the heads."""
    from openvino import opset13 as ops

    if times == 1:
        return x
    size = x.get_partial_shape()[3].get_length()
    single = ops.unsqueeze(x, np.array(2))
    several = ops.broadcast(single, np.array([1, 1, times, 1, 1]), broadcast_spec="BIDIRECTIONAL")
    return ops.reshape(several, np.array([0, heads, -1, size]), special_zero=True)


def store_half(model: Any) -> None:
    """Stores the constants of an `openvino.Model` as float16, and computes with them in float32 as before. OpenVINO's
    own compression leaves these models as they are. A tensor stays in float32 if a number would become 0 in float16.

    Raises:
        LoopQError: a tensor has numbers that are too large for float16.
    """
    from openvino import Type
    from openvino import opset13 as ops

    for node in model.get_ops():
        if node.get_type_name() == "Constant" and node.get_element_type() == Type.f32 and node.get_byte_size() > _SMALL:
            narrow = half_of(node.data, node.get_friendly_name())
            if narrow is None:
                continue
            half = ops.convert(ops.constant(narrow), "f32")
            for reader in node.output(0).get_target_inputs():
                reader.replace_source_output(half.output(0))
    model.validate_nodes_and_infer_types()


def _data(value: Any) -> np.ndarray:
    node = value.get_node()
    if node.get_type_name() != "Constant":
        raise InternalError(f"A quantized weight or its scale is {node.get_type_name()}, not a constant.")
    return np.asarray(node.data)
