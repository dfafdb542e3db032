"""Types of graph values for people: `f32[batch, sequence, 64]`, `i4[batch, sequence, 2 x 32]`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from loopq_compile.graph.conditions import evaluate
from loopq_compile.graph.device import CPU, device_of
from loopq_compile.graph.keys import BITS, TYPE
from loopq_compile.graph.propagation import Propagation
from loopq_compile.graph.signature import LOOPS_AXIS, PAST, TOTAL, Signature
from loopq_compile.graph.state import get_state, get_tensor

_SHORT = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float64: "f64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}


def infer_shapes(graph_module: fx.GraphModule) -> None:
    """Recomputes `node.meta["val"]` of every node from the inputs' values, with symbolic batch and sequence."""
    inputs = [node.meta.get("val") for node in graph_module.graph.nodes if node.op == "placeholder"]
    if any(value is None for value in inputs):
        state = get_state(graph_module)
        inputs = symbolic_inputs(state.signature, state.loops.count, device_of(graph_module))
    mode = inputs[0].fake_mode  # type: ignore[union-attr]
    Propagation(graph_module, mode).propagate(*inputs)
    names = symbol_names(graph_module)
    for node in graph_module.graph.nodes:
        node.meta[TYPE] = _type(graph_module, node, names)


def symbolic_inputs(signature: Signature, loops: int | None, device: torch.device = CPU) -> list[Tensor]:
    """Fake tensors on `device` for the inputs; dimensions of one name share a symbol. A graph runs a fixed number of
    `loops`; None leaves that number open."""
    specs = [
        replace(s, shape=tuple((loops or size) if size == LOOPS_AXIS else size for size in s.shape))
        for s in signature.inputs
    ]
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=False, allow_non_fake_inputs=True)
    sizes: dict[str, Any] = {}
    examples = _example_sizes(signature)
    for spec in specs:
        example = torch.zeros(
            [size if isinstance(size, int) else examples.get(size, 5 + len(size)) for size in spec.shape],
            dtype=spec.dtype,
        )
        dynamic = [DimDynamic.STATIC if isinstance(size, int) else DimDynamic.DYNAMIC for size in spec.shape]
        fake = mode.from_tensor(example, symbolic_context=StatelessSymbolicContext(dynamic_sizes=dynamic))
        for name, size in zip(spec.shape, fake.shape, strict=True):
            if isinstance(name, str) and " + " not in name:
                sizes.setdefault(name, size)
    for condition in signature.conditions:  # such as `labels_1 == sequence - 1`
        name, _, expression = condition.text.partition(" == ")
        if name in sizes and name not in expression:
            sizes[name] = evaluate(expression, sizes)
    with mode:
        shapes = [[_named_size(size, sizes) for size in spec.shape] for spec in specs]
        return [torch.empty(s, dtype=x.dtype, device=device) for s, x in zip(shapes, specs, strict=True)]


def _example_sizes(signature: Signature) -> dict[str, int]:
    """Sizes at which a program's conditions hold; none if it has no conditions. A cache holds part of the tokens."""
    sizes = dict(signature.captured)
    if any(TOTAL in spec.shape for spec in signature.inputs) and sizes.get("sequence", 0) > 3:
        sizes[TOTAL], sizes[PAST] = sizes["sequence"], sizes["sequence"] // 2
        sizes["sequence"] -= sizes[PAST]
    return sizes


def _named_size(size: int | str, sizes: dict[str, Any]) -> Any:
    """A size, or the symbol (or the sum of symbols) that a name stands for."""
    return sum(sizes[part] for part in size.split(" + ")) if isinstance(size, str) else size


def symbol_names(graph_module: fx.GraphModule) -> dict[str, str]:
    """Names of the exporter's symbols: `{"s72": "batch", ...}`."""
    inputs = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    names: dict[str, str] = {}
    for node, spec in zip(inputs, get_state(graph_module).signature.inputs, strict=True):
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            for size, name in zip(value.shape, spec.shape, strict=True):
                if isinstance(name, str) and not isinstance(size, int):
                    names[str(size)] = name
    return names


def type_of(node: fx.Node) -> str:
    """The node's type as text, "" if unknown."""
    return node.meta.get(TYPE, "")


def _type(graph_module: fx.GraphModule, node: fx.Node, names: dict[str, str]) -> str:
    value = get_tensor(graph_module, str(node.target)) if node.op == "get_attr" else node.meta.get("val")
    if isinstance(value, Tensor):
        bits = node.meta.get(BITS)
        element = _SHORT.get(value.dtype, str(value.dtype).removeprefix("torch."))
        if bits and value.dtype == torch.int8:
            element = f"i{bits}"
        return f"{element}[{', '.join(_size(size, names) for size in value.shape)}]"
    return f"int {_size(value, names)}" if isinstance(value, int | torch.SymInt) else ""


def _size(size: Any, names: dict[str, str]) -> str:
    text = str(size)
    for symbol, name in names.items():
        text = text.replace(symbol, name)
    return text
