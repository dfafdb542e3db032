"""Quantized activations for target `qdq`: `QuantizeLinear` and `DequantizeLinear` with integers between them.

Static scales belong to groups of features. ONNX cannot express this along one axis, so `x [..., K]` is viewed as
`[..., groups, K / groups]` with the scales along `axis = -2`. Dynamic scales belong to tokens and groups, which ONNX
calls blocked: the scale has the rank of `x`, and `block_size` features share an entry of its last axis.

Zero points are left out and `output_dtype` gives the type. Symmetric quantization needs no zero points, and ONNX
Runtime 1.31 drops the type of a zero point of one entry when it moves a pair across a Reshape.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from loopq_compile.backends.onnx.emit import Emitter, constant, constant_array, replace_value, sizes
from loopq_compile.errors import InternalError
from loopq_compile.operators.quantize import SMALLEST_SCALE


def lower_dynamic_scale(graph: ir.Graph, node: ir.Node) -> None:
    """Replaces `DynamicScale(x, clip)` by `peak(x_group) * (clip / limit)`, `[..., groups]`, bounded away from 0.

    The peak is the largest magnitude, or, for a negative limit, the entry of largest magnitude.
    """
    x, clip = node.inputs
    assert x is not None and clip is not None
    group_size, limit = node.attributes["group_size"].as_int(), node.attributes["limit"].as_int()
    groups, leading = sizes(x)[-1] // group_size, sizes(x)[:-1]
    emitter = Emitter(graph, node)
    grouped = emitter.reshape(x, [groups, group_size], len(leading))
    shape = [*leading, groups]
    scale = emitter.node("Mul", [_peak(emitter, grouped, shape, limit), _step(emitter, clip, limit)], x.dtype, shape)
    if limit > 0:
        floor = constant(graph, f"smallest_scale_{x.dtype}", _like(SMALLEST_SCALE, x))
        scale = emitter.node("Max", [scale, floor], x.dtype, shape)
    emitter.finish(scale)


def _peak(emitter: Emitter, grouped: ir.Value, shape: list[Any], limit: int) -> ir.Value:
    axis, dtype = constant(emitter.graph, "last_axis", [-1]), grouped.dtype
    if limit > 0:
        magnitude = emitter.node("Abs", [grouped], dtype, grouped.shape)
        return emitter.node("ReduceMax", [magnitude, axis], dtype, shape, {"keepdims": 0})
    high = emitter.node("ReduceMax", [grouped, axis], dtype, shape, {"keepdims": 0})
    low = emitter.node("ReduceMin", [grouped, axis], dtype, shape, {"keepdims": 0})
    above = emitter.node("Greater", [high, emitter.node("Neg", [low], dtype, shape)], ir.DataType.BOOL, shape)
    # No scale is zero after this: a group of zeros takes the lowest entry. This is one node; limiting the scale's
    # magnitude would take three. Groups below the smallest scale keep their own scales.
    below = constant(emitter.graph, f"below_zero_{dtype}", _like(-SMALLEST_SCALE, grouped))
    return emitter.node("Where", [above, high, emitter.node("Min", [low, below], dtype, shape)], dtype, shape)


def _step(emitter: Emitter, clip: ir.Value, limit: int) -> ir.Value:
    """`clip / limit`, as a constant if `clip` is one."""
    values = constant_array(clip)
    if values is not None:
        return constant(emitter.graph, f"{clip.name}.over_{_word(limit)}", values / values.dtype.type(limit))
    return emitter.node("Div", [clip, _limit(emitter, limit, clip)], clip.dtype, clip.shape)


def _word(limit: int) -> str:
    """A number as part of a name."""
    return str(limit).replace("-", "minus")


def lower_pair(graph: ir.Graph, quantize: ir.Node) -> None:
    """Replaces `Quantize(x, scale)` and the `Dequantize` nodes that read it.

    Raises:
        InternalError: something else reads the integers, or the scale does not fit `x`.
    """
    x, scale = quantize.inputs
    assert x is not None and scale is not None
    readers = [reader for reader, _ in quantize.outputs[0].uses()]
    if not readers or any(reader.op_type != "Dequantize" or reader.inputs[1] is not scale for reader in readers):
        raise InternalError(
            f"{quantize.name}: its integers are read by something other than a dequantize with its scale."
        )
    q_min, q_max = quantize.attributes["q_min"].as_int(), quantize.attributes["q_max"].as_int()
    emitter = Emitter(graph, quantize)
    width, last, groups = sizes(x)[-1], len(sizes(x)) - 1, sizes(scale)[-1]
    attributes: dict[str, int] = {}
    if len(sizes(scale)) == 1:
        whole = groups == 1
        view = x if whole else _group(emitter, x, groups)
        clipped = _clip(emitter, view, _column(emitter, scale, whole), q_min, q_max)
        attributes = {} if whole else {"axis": last}
        scale = _column(emitter, scale, whole, scalar=True)
    elif len(sizes(scale)) == last + 1:
        clipped = x
        if _is_odd(q_min, q_max):
            view, column = _group(emitter, x, groups), emitter.reshape(scale, [groups, 1], last)
            clipped = emitter.reshape(_clip(emitter, view, column, q_min, q_max), [width], last)
        attributes = {"axis": last, "block_size": width // groups}
    else:
        raise InternalError(f"{quantize.name}: a scale of shape {scale.shape} does not fit {x.shape}.")
    stored = ir.DataType.INT4 if q_min >= -8 and q_max <= 7 else ir.DataType.INT8
    typed = {**attributes, "output_dtype": stored.value}
    codes = emitter.node("QuantizeLinear", [clipped, scale], stored, clipped.shape, typed)
    for reader in dict.fromkeys(readers):
        emitter = Emitter(graph, reader)
        y = emitter.node("DequantizeLinear", [codes, scale], x.dtype, clipped.shape, attributes)
        emitter.finish(y if len(sizes(y)) == last + 1 else emitter.reshape(y, [width], last))
    graph.remove(quantize, safe=True)


def spell_out_pair(graph: ir.Graph, quantize: ir.Node) -> None:
    """Replaces a pair by `clip(round(x / scale)) * scale`, which is bit-identical.

    ONNX Runtime 1.32 dequantizes 4-bit integers one by one. For prompts, these nodes take a quarter of that time; for a
    single token, there are too many of them.
    """
    x, scale = quantize.inputs
    assert x is not None and scale is not None
    emitter, leading, width = Emitter(graph, quantize), len(sizes(x)) - 1, sizes(x)[-1]
    groups = sizes(scale)[-1]
    if len(sizes(scale)) == 1:
        column = _column(emitter, scale, whole=False)
    else:
        column = emitter.reshape(scale, [groups, 1], leading)
    view = _group(emitter, x, groups)
    steps = emitter.node("Div", [view, column], x.dtype, view.shape)
    whole = emitter.node("Round", [steps], x.dtype, view.shape)
    ends = [_limit(emitter, quantize.attributes[name].as_int(), x) for name in ("q_min", "q_max")]
    codes = emitter.node("Clip", [whole, *ends], x.dtype, view.shape)
    rounded = emitter.reshape(emitter.node("Mul", [codes, column], x.dtype, view.shape), [width], leading)
    for reader in list(dict.fromkeys(reader for reader, _ in quantize.outputs[0].uses())):
        replace_value(reader.outputs[0], rounded)
        graph.remove(reader, safe=True)
    graph.remove(quantize, safe=True)


def _limit(emitter: Emitter, limit: int, x: ir.Value) -> ir.Value:
    return constant(emitter.graph, f"limit_{_word(limit)}_{x.dtype}", _like(limit, x))


def _group(emitter: Emitter, x: ir.Value, groups: int) -> ir.Value:
    return emitter.reshape(x, [groups, sizes(x)[-1] // groups], len(sizes(x)) - 1)


def _is_odd(q_min: int, q_max: int) -> bool:
    """True for ranges that no ONNX integer type has: 2, 3, 5, 6 and 7 bits."""
    return (q_min, q_max) not in ((-8, 7), (-128, 127))


def _clip(emitter: Emitter, x: ir.Value, scale: ir.Value, q_min: int, q_max: int) -> ir.Value:
    """`x` limited to `q_min * scale` up to `q_max * scale`, if the integer type has a wider range.

    This equals limiting the integers: a limit divided by the scale is an integer up to one unit in the last place, and
    rounds to it.
    """
    if not _is_odd(q_min, q_max):
        return x
    low, high = (_scaled(emitter, scale, limit) for limit in (q_min, q_max))
    if constant_array(scale) is None:  # it may be negative
        ends = [low, high]
        low, high = (emitter.node(op_type, ends, x.dtype, low.shape) for op_type in ("Min", "Max"))
    return emitter.node("Min", [emitter.node("Max", [x, low], x.dtype, x.shape), high], x.dtype, x.shape)


def _scaled(emitter: Emitter, scale: ir.Value, limit: int) -> ir.Value:
    values = constant_array(scale)
    if values is not None:
        return constant(emitter.graph, f"{scale.name}.times_{_word(limit)}", values * values.dtype.type(limit))
    factor = constant(emitter.graph, f"factor_{_word(limit)}_{scale.dtype}", _like(limit, scale))
    return emitter.node("Mul", [scale, factor], scale.dtype, scale.shape)


def _column(emitter: Emitter, scale: ir.Value, whole: bool, *, scalar: bool = False) -> ir.Value:
    """A scale `[groups]` as `[groups, 1]`; as a scalar if it is one for all of `x`; or unchanged."""
    if scalar and not whole:
        return scale
    shape: tuple[int, ...] = () if whole else (-1, 1)
    values = constant_array(scale)
    if values is not None:
        return constant(emitter.graph, f"{scale.name}.{'scalar' if whole else 'column'}", values.reshape(shape))
    target = constant(emitter.graph, "shape_scalar" if whole else "shape_column", np.array(shape, dtype=np.int64))
    return emitter.node("Reshape", [scale, target], scale.dtype, () if whole else (*sizes(scale), 1))


def _like(number: float, value: ir.Value) -> np.ndarray:
    assert value.dtype is not None
    return np.array(number, dtype=value.dtype.numpy())
