"""What an export wrote."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

_NUMBER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class OnnxExport:
    """The result of an export.

    Args:
        path: the `.onnx` file.
        files: all files written, the model first.
        bytes: their total size, external data included.
        target, form: as requested.
        opset: version of the standard operator set.
        nodes: number of nodes by operator.
        integer_weights: number of quantized weights by ONNX type, for instance `{"INT4": 28}`.
        inputs, outputs: such as `input_ids: INT64[batch, sequence]`.
    """

    path: Path
    files: tuple[Path, ...]
    bytes: int
    target: str
    form: str
    opset: int
    nodes: dict[str, int]
    integer_weights: dict[str, int]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def node_count(self) -> int:
        """Number of nodes."""
        return sum(self.nodes.values())

    def __str__(self) -> str:
        common = ", ".join(f"{count} {name}" for name, count in list(self.nodes.items())[:6])
        weights = ", ".join(f"{count} {name}" for name, count in self.integer_weights.items()) or "none"
        return "\n".join(
            [
                f"{self.path}  {_size(self.bytes)}{' with external data' if len(self.files) > 1 else ''}",
                f"  target {self.target}, form {self.form}, opset {self.opset}",
                f"  {self.node_count} nodes: {common}{', ...' if len(self.nodes) > 6 else ''}",
                f"  quantized weights: {weights}",
                f"  ({', '.join(_brief(self.inputs))}) -> ({', '.join(_brief(self.outputs))})",
            ]
        )


def describe(model: ir.Model, files: list[Path], *, target: str, form: str) -> OnnxExport:
    """The report on `model`, which was written to `files`."""
    nodes = Counter(node.op_type for node in model.graph.all_nodes())
    integers = (ir.DataType.INT4, ir.DataType.INT8)
    weights = Counter(
        value.dtype.name
        for value in model.graph.initializers.values()
        if value.dtype in integers and value.shape is not None and len(value.shape) == 2
    )
    return OnnxExport(
        path=files[0],
        files=tuple(files),
        bytes=sum(file.stat().st_size for file in files),
        target=target,
        form=form,
        opset=model.opset_imports[""],
        nodes=dict(nodes.most_common()),
        integer_weights=dict(sorted(weights.items())),
        inputs=tuple(map(_value, model.graph.inputs)),
        outputs=tuple(map(_value, model.graph.outputs)),
    )


def _value(value: ir.Value) -> str:
    shape = ", ".join(str(getattr(size, "value", size)) for size in value.shape) if value.shape is not None else "?"
    return f"{value.name}: {value.dtype.name if value.dtype is not None else '?'}[{shape}]"


def _brief(values: Iterable[str]) -> list[str]:
    """One entry for values that differ only in a number: `present.0..29.key: FLOAT[...]`."""
    alike: dict[str, list[str]] = {}
    for value in values:
        number = _NUMBER.search(value)
        alike.setdefault(_NUMBER.sub(".{}.", value, count=1), []).append(number[1] if number else "")
    return [
        form.replace(".{}.", f".{numbers[0]}..{numbers[-1]}." if len(numbers) > 1 else f".{numbers[0]}.")
        for form, numbers in alike.items()
    ]


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
