"""Target `onnxruntime`: 4-bit and 8-bit products as `com.microsoft::MatMulNBits`, which multiplies packed weights.

With `products="int8"`, `row_products` writes products whose activations are quantized; `branches` puts both forms into
one file.

The operator takes `[N, K]` weights in blocks of one scale, as unsigned codes around 8 (or 128), two 4-bit codes to the
byte. Weights that do not fit (blocks that are not a power of two of at least 16) stay as in target `qdq`.

At `accuracy_level` 4, ONNX Runtime multiplies integers. For that it rounds activations to 8 bits per block, with the
largest magnitude of the block as 127. The level is therefore used only where activations are already quantized;
other products are in single precision. Dynamic 8-bit activations in blocks of the weight's size, unclipped, are rounded
in exactly this way, so their own quantize and dequantize nodes are removed: a third of all nodes of a small model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from loopq_compile.backends.onnx.emit import Emitter, constant, constant_array, sizes
from loopq_compile.backends.onnx.flatten import DOMAIN
from loopq_compile.backends.onnx.matching import made_by
from loopq_compile.backends.onnx.row_products import RowProducts, to_rows
from loopq_compile.errors import LoopQError

CONTRIB = "com.microsoft"
SMALLEST_BLOCK = 16
_HEAD_BLOCKS = {4: (32,), 8: (128, 64, 32)}
"""Block sizes of a head's weights, by width: the first that divides the features is used."""


def pack_products(graph: ir.Graph, products: str = "packed") -> int:
    """Replaces linear layers whose weights fit by products of packed weights, or of whole rows of 8-bit integers.

    Args:
        products: "packed" or "int8"; for "both", `branches` joins the two.

    Raises:
        LoopQError: `products="int8"` for a program whose activations are not quantized.
    """
    graph.opset_imports[CONTRIB] = 1
    rows = RowProducts(graph) if products == "int8" else None
    linears = [node for node in graph if node.domain == DOMAIN and node.op_type == "Linear"]
    made = sum(_lower_linear(graph, node, rows) for node in linears)
    if rows is not None and not rows.count:
        raise LoopQError(
            "products='int8' and 'both' multiply activations in 8 bits; this program has no product of quantized "
            "weights and quantized activations: compile it with a scheme such as 'w4a8'."
        )
    return made


def pack_head(graph: ir.Graph, bits: int) -> int:
    """Replaces the language-model head, which schemes leave in floating point, by a packed product.

    Embeddings that are tied to it are read from the same table.

    Args:
        bits: width of its weights, 4 or 8.

    Raises:
        LoopQError: there is none.
    """
    heads = _heads(graph, bits)
    for node in heads:
        weight = node.inputs[1]
        _pack_head(graph, node, bits)
        _share_table(graph, weight, bits)
    return len(heads)


def round_head(graph: ir.Graph, bits: int) -> int:
    """Rounds the language-model head, which schemes leave in floating point, and embeddings that are tied to it.

    Args:
        bits: width of its weights, 4 or 8.

    Raises:
        LoopQError: there is none.
    """
    heads = _heads(graph, bits)
    for weight in dict.fromkeys(x for node in heads if (x := node.inputs[1]) is not None):
        codes, scale = _rounded_head(weight, bits)
        emitter = Emitter(graph, graph[0])
        given = [constant(graph, f"{weight.name}.codes", codes), constant(graph, f"{weight.name}.scales", scale)]
        about = {"group_size": codes.shape[1] // scale.shape[1], "bits": bits}
        made = emitter.node("Dequantize", given, weight.dtype, weight.shape, about, DOMAIN)
        for reader, position in [*weight.uses()]:
            reader.replace_input_with(position, made)
        graph.initializers.pop(str(weight.name), None)
    return len(heads)


def rounded_linears(graph: ir.Graph) -> list[tuple[ir.Node, ir.Value]]:
    """Linears whose inputs an engine can round itself, to 8 bits by the largest magnitude of a group, and these inputs
    before they are rounded."""
    nodes = [node for node in graph if node.domain == DOMAIN and node.op_type == "Linear"]
    pairs = [(node, before_rounding(node.inputs[0])) for node in nodes if node.inputs[0] is not None]
    return [(node, x) for node, x in pairs if x is not None]


def leave_rounding(graph: ir.Graph) -> int:
    """Reads activations before their rounding to 8 bits, for an engine that rounds them itself."""
    pairs = rounded_linears(graph)
    for node, x in pairs:
        node.replace_input_with(0, x)
    return len(pairs)


def remove_unread(graph: ir.Graph) -> int:
    """Removes opaque nodes that nothing reads any more."""
    removed = 0
    for op_type in ("Dequantize", "Quantize", "DynamicScale", "Row"):
        for node in [node for node in graph if node.domain == DOMAIN and node.op_type == op_type]:
            if not node.outputs[0].uses():
                graph.remove(node, safe=True)
                removed += 1
    return removed


def restate_norms(graph: ir.Graph) -> int:
    """Writes `x * reciprocal(sqrt(v))` as `x / sqrt(v)`, which ONNX Runtime recognizes in an RMS norm and fuses."""
    found = 0
    for node in [node for node in graph if node.op_type == "Reciprocal" and node.domain == ""]:
        root = node.inputs[0]
        maker = root.producer() if root is not None else None
        readers = [(reader, position) for reader, position in node.outputs[0].uses()]
        if maker is None or maker.op_type != "Sqrt" or any(reader.op_type != "Mul" for reader, _ in readers):
            continue
        for reader, position in readers:
            x, result = reader.inputs[1 - position], reader.outputs[0]
            assert x is not None and root is not None
            emitter = Emitter(graph, reader)
            emitter.finish(emitter.node("Div", [x, root], result.dtype, result.shape))
        graph.remove(node, safe=True)
        found += 1
    return found


@dataclass(frozen=True)
class _Weight:
    """A quantized weight: integers `[..., N, K]`, scales `[..., N, groups]`, and the rows of them that are read."""

    name: str
    codes: np.ndarray
    codes_row: ir.Value | None
    scale_name: str
    scale: np.ndarray
    scale_row: ir.Value | None

    @property
    def block(self) -> int:
        return self.codes.shape[-1] // self.scale.shape[-1]


def _lower_linear(graph: ir.Graph, node: ir.Node, rows: RowProducts | None) -> bool:
    """Replaces `Linear(x, Dequantize(codes, scale), bias)`; False if its weight does not fit."""
    x, weight = node.inputs[0], _weight(node.inputs[1])
    if x is None or weight is None:
        return False
    emitter, result = Emitter(graph, node), node.outputs[0]
    quantized = made_by(x, "Dequantize", DOMAIN) is not None
    if rows is not None and quantized:
        _finish(emitter, node, _in_rows(emitter, before_rounding(x) or x, weight, result, rows))
        return True
    if weight.block < SMALLEST_BLOCK or weight.block & (weight.block - 1):
        return False
    bits = 4 if weight.codes.min(initial=0) >= -8 and weight.codes.max(initial=0) <= 7 else 8
    codes = _pack(weight.codes, weight.scale.shape[-1], bits)
    packed = _row(emitter, constant(graph, f"{weight.name}.packed", codes), weight.codes_row)
    scales = _row(emitter, constant(graph, f"{weight.scale_name}.scales", weight.scale), weight.scale_row)
    x = before_rounding(x, weight.block) or x
    attributes = {"K": weight.codes.shape[-1], "N": weight.codes.shape[-2], "bits": bits, "block_size": weight.block}
    attributes["accuracy_level"] = 4 if quantized else 1
    y = emitter.node("MatMulNBits", [x, packed, scales], result.dtype, result.shape, attributes, domain=CONTRIB)
    _finish(emitter, node, y)
    return True


def _weight(value: ir.Value | None) -> _Weight | None:
    """The weight from which `value` comes; None if it is not quantized or not stored."""
    dequantize = made_by(value, "Dequantize", DOMAIN)
    if dequantize is None:
        return None
    codes_value, codes, codes_row = _stored(dequantize.inputs[0])
    scale_value, scale, scale_row = _stored(dequantize.inputs[1])  # a tensor that is equal in all loops has no row
    if codes is None or scale is None or codes_value is None or scale_value is None:
        return None
    scale = np.broadcast_to(scale, (*scale.shape[:-2], codes.shape[-2], scale.shape[-1]))
    return _Weight(str(codes_value.name), codes, codes_row, str(scale_value.name), scale, scale_row)


def _in_rows(emitter: Emitter, x: ir.Value, weight: _Weight, result: ir.Value, rows: RowProducts) -> ir.Value:
    graph, row = emitter.graph, weight.scale_row if weight.codes_row is None else weight.codes_row
    names = [f"{weight.name}.{part}.{weight.scale_name}" for part in ("rows", "row_scales")]
    if names[0] not in graph.initializers:
        made = to_rows(weight.codes * np.repeat(weight.scale, weight.block, axis=-1))
        for name, values in zip(names, made, strict=True):
            constant(graph, name, values)
    codes, scale = (_row(emitter, graph.initializers[name], row) for name in names)
    return rows.emit(emitter, x, codes, scale, result)


def _finish(emitter: Emitter, node: ir.Node, y: ir.Value) -> None:
    """Replaces the linear `node` by `y` plus its bias."""
    bias, result = node.inputs[2] if len(node.inputs) > 2 else None, node.outputs[0]
    emitter.finish(y if bias is None else emitter.node("Add", [y, bias], result.dtype, result.shape))


def _heads(graph: ir.Graph, bits: int) -> list[ir.Node]:
    """The `Linear` nodes that give the logits; `bits` are for the error."""
    linears = [node for node in graph if node.domain == DOMAIN and node.op_type == "Linear"]
    heads = [node for node in linears if node.outputs[0].name == "logits"]
    if not heads:
        raise LoopQError(f"head_bits={bits} needs logits that come straight from a linear head.")
    return heads


def _rounded_head(weight: ir.Value | None, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """A head's weights rounded to nearest in blocks: integers `[N, K]` and scales `[N, blocks]`."""
    values = constant_array(weight)
    if values is None or values.ndim != 2 or values.shape[1] % _HEAD_BLOCKS[bits][-1]:
        raise LoopQError(f"head_bits={bits} needs a linear head with a multiple of {_HEAD_BLOCKS[bits][-1]} inputs.")
    outputs, features = values.shape
    block = next(size for size in _HEAD_BLOCKS[bits] if features % size == 0)
    blocks = values.reshape(outputs, -1, block)
    scale = np.maximum(np.abs(blocks).max(-1), 1e-12) / np.float32(2 ** (bits - 1) - 1)
    codes = np.rint(blocks / scale[..., None]).astype(np.int8).reshape(values.shape)
    return codes, scale.astype(values.dtype)


def _pack_head(graph: ir.Graph, node: ir.Node, bits: int) -> None:
    """Replaces the `Linear` that gives the logits: weights rounded to nearest in blocks, activations to 8 bits."""
    x, weight = node.inputs[:2]
    assert x is not None and weight is not None
    codes, scale = _rounded_head(weight, bits)
    (outputs, features), blocks = codes.shape, scale.shape[1]
    packed = constant(graph, f"{weight.name}.packed", _pack(codes, blocks, bits))
    scales = constant(graph, f"{weight.name}.scales", scale)
    attributes = {"K": features, "N": outputs, "bits": bits, "block_size": features // blocks, "accuracy_level": 4}
    emitter, result = Emitter(graph, node), node.outputs[0]
    y = emitter.node("MatMulNBits", [x, packed, scales], result.dtype, result.shape, attributes, domain=CONTRIB)
    _finish(emitter, node, y)


def _share_table(graph: ir.Graph, weight: ir.Value | None, bits: int) -> None:
    """Lets embeddings that are tied to the head look up its packed rows, so that the file has one table of integers."""
    assert weight is not None
    readers = [reader for reader, _ in weight.uses()]
    if any(reader.op_type != "Gather" or reader.attributes.get_int("axis", 0) != 0 for reader in readers):
        return
    packed, scales = (graph.initializers[f"{weight.name}.{part}"] for part in ("packed", "scales"))
    groups, size = sizes(packed)[1], sizes(packed)[2] * 8 // bits
    attributes = {"gather_axis": 0, "quantize_axis": 2, "block_size": size, "bits": bits}
    for node in readers:
        emitter, result, ids = Emitter(graph, node), node.outputs[0], node.inputs[1]
        assert ids is not None
        last, shape = constant(graph, "last_axis", [-1]), [*sizes(ids), groups, size]
        columns = emitter.node("Unsqueeze", [scales, last], scales.dtype, [*sizes(scales), 1])
        rows = emitter.node(
            "GatherBlockQuantized", [packed, ids, columns], result.dtype, shape, attributes, domain=CONTRIB
        )
        emitter.finish(emitter.reshape(rows, [groups * size], len(sizes(ids))))
    if not weight.uses():
        graph.initializers.pop(str(weight.name), None)


def before_rounding(x: ir.Value, block: int | None = None) -> ir.Value | None:
    """The activations before they were rounded to 8 bits, if the product rounds them again; otherwise None.

    Args:
        block: accept only rounding in blocks of this size, as `MatMulNBits` does; None accepts any size.
    """
    dequantize = made_by(x, "Dequantize", DOMAIN)
    quantize = made_by(dequantize.inputs[0], "Quantize", DOMAIN) if dequantize is not None else None
    scale = made_by(quantize.inputs[1], "DynamicScale", DOMAIN) if quantize is not None else None
    if quantize is None or scale is None or scale.inputs[0] is not quantize.inputs[0]:
        return None
    clip = constant_array(_stored(scale.inputs[1])[0])
    same = quantize.attributes["q_max"].as_int() == scale.attributes["limit"].as_int() == 127
    blocks = block is None or (
        quantize.attributes["group_size"].as_int() == scale.attributes["group_size"].as_int() == block
    )
    return quantize.inputs[0] if same and blocks and clip is not None and (clip == 1).all() else None


def _stored(value: ir.Value | None) -> tuple[ir.Value | None, np.ndarray | None, ir.Value | None]:
    """The initializer from which `value` comes, its array, and the row that is read (None for all of it)."""
    node = value.producer() if value is not None else None
    if node is not None and node.domain == DOMAIN and node.op_type == "Row":
        return node.inputs[0], constant_array(node.inputs[0]), node.inputs[1]
    return value, constant_array(value), None


def _row(emitter: Emitter, value: ir.Value, row: ir.Value | None) -> ir.Value:
    """Row `row` of `value`, or all of it if that is None."""
    return value if row is None else emitter.node("Gather", [value, row], value.dtype, sizes(value)[1:], {"axis": 0})


def _pack(codes: np.ndarray, groups: int, bits: int) -> np.ndarray:
    """Signed codes `[..., N, K]` as bytes `[..., N, groups, K / groups * bits / 8]`, earlier codes in low halves."""
    unsigned = (codes.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    if bits == 4:
        unsigned = unsigned[..., ::2] | (unsigned[..., 1::2] << 4)
    return unsigned.reshape(*codes.shape[:-1], groups, -1)
