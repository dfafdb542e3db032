"""Target `onnxruntime`, `products="int8"`: products of whole rows of 8-bit integers, with one scale per row.

`MatMulNBits` reads half the bytes, which decides the time of a single token. For more than a few rows, its kernels are
slower than single precision, since they use a new scale after every 32 products. A row with one scale goes through the
processor's integer units (VNNI, AMX) in one sweep. For that, weights are rounded once more, to 7 bits per output, and
activations to 8 bits per token. For weights this adds little to their 4 bits; tokens with outliers lose accuracy.
Weights have 7 bits because processors without VNNI add two products in 16 bits and saturate: 2 * 255 * 63 fits;
2 * 255 * 127 does not, and made every result wrong there.

The head stays packed: its input has outliers, and it reads only one row of a prompt. Products that read one tensor stay
separate: unlike packed ones they share its rounding anyway, and results of prompts would have to be split again.

Activations are unsigned around 128, since those units multiply unsigned activations by signed weights.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from loopq_compile.backends.onnx.emit import Emitter, constant, sizes
from loopq_compile.operators.quantize import SMALLEST_SCALE

CONTRIB = "com.microsoft"
PRODUCT = "MatMulIntegerToFloat"
_LIMIT = 127
_WEIGHT_LIMIT = 63


class RowProducts:
    """Writes such products; those that read one tensor share its integers.

    Args:
        graph: where the products go.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.count = 0
        self._rounded: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}

    def emit(self, emitter: Emitter, x: ir.Value, weight: ir.Value, scale: ir.Value, result: ir.Value) -> ir.Value:
        """`x @ weight * scale`.

        Args:
            emitter: emitter before the product that is replaced.
            x: `[..., K]`.
            weight: signed integers `[K, N]`.
            scale: `[N]`.
            result: gives the type and shape of the returned value, `[..., N]`.
        """
        self.count += 1
        if x not in self._rounded:
            self._rounded[x] = self._round(emitter, x)
        integers, step = self._rounded[x]
        one, middle = self._constants(x.dtype)
        given = [integers, weight, one, scale, middle]
        product = emitter.node(PRODUCT, given, result.dtype, result.shape, domain=CONTRIB)
        return emitter.node("Mul", [product, step], result.dtype, result.shape)

    def _round(self, emitter: Emitter, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Integers `[..., K]` around 128 and the step of every token, `[..., 1]`."""
        axis, shape = constant(self.graph, "last_axis", [-1]), [*sizes(x)[:-1], 1]
        numpy = x.dtype.numpy() if x.dtype is not None else np.dtype(np.float32)
        magnitude = emitter.node("Abs", [x], x.dtype, x.shape)
        peak = emitter.node("ReduceMax", [magnitude, axis], x.dtype, shape, {"keepdims": 1})
        inverse = constant(self.graph, f"inverse_limit_{x.dtype}", np.array(1 / _LIMIT, numpy))
        floor = constant(self.graph, f"smallest_scale_{x.dtype}", np.array(SMALLEST_SCALE, numpy))
        step = emitter.node("Max", [emitter.node("Mul", [peak, inverse], x.dtype, shape), floor], x.dtype, shape)
        one, middle = self._constants(x.dtype)
        steps = emitter.node("Div", [x, step], x.dtype, x.shape)
        return emitter.node("QuantizeLinear", [steps, one, middle], ir.DataType.UINT8, x.shape), step

    def _constants(self, dtype: ir.DataType | None) -> tuple[ir.Value, ir.Value]:
        numpy = dtype.numpy() if dtype is not None else np.dtype(np.float32)
        one = constant(self.graph, f"one_{dtype}", np.array(1, numpy))
        return one, constant(self.graph, "middle", np.array(128, np.uint8))


def to_rows(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A weight `[..., N, K]` as int8 `[..., K, N]` and scales `[..., N]`, rounded to nearest."""
    scale = np.maximum(np.abs(weight).max(-1), SMALLEST_SCALE).astype(weight.dtype) / weight.dtype.type(_WEIGHT_LIMIT)
    codes = np.rint(weight / scale[..., None]).astype(np.int8)
    return np.ascontiguousarray(np.swapaxes(codes, -1, -2)), scale
