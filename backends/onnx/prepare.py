"""First step of an export: a private copy of the graph, with constants for each loop, and a record of where every node
comes from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

import loopq_compile.operators  # noqa: F401  (registers torch.ops.loopq)
from loopq_compile.errors import LoopQError
from loopq_compile.graph.constants import constant_nodes, evaluate
from loopq_compile.graph.keys import BITS, SITE, TRANSFORM
from loopq_compile.graph.loops import get_tag
from loopq_compile.graph.recurrence import module_calls
from loopq_compile.graph.rolled import RolledLoop
from loopq_compile.graph.state import get_state, get_tensor

_aten, _loopq = torch.ops.aten, torch.ops.loopq
_READERS = {
    _loopq.quantize.default,
    _loopq.dequantize.default,
    _loopq.dynamic_scale.default,
    _loopq.kronecker.default,
    _loopq.transition_adapter.default,
    _loopq.compensate.default,
}
"""Operators that read rows of per-loop tables: scales, clip ratios, factors of transforms, parts of adapters and of
compensation."""


@dataclass(frozen=True)
class Origin:
    """Where a node of the ONNX graph comes from.

    Args:
        node: name of the node in the program's graph, as the printed program shows it.
        loop: loop label such as `"2"` or `"2.0"`, empty outside loops.
        site: linear layer it serves, or else the innermost module around it; may be empty.
        bits: width of the integers that a weight's dequantize node reads, None if not recorded.
    """

    node: str
    loop: str = ""
    site: str = ""
    bits: int | None = None


@dataclass
class Prepared:
    """A graph ready for translation.

    Args:
        graph_module: copy of the program's graph; its tensors are the program's own.
        outputs: one entry for every flat result of the program: the number of the graph output that holds it, or
            `{"constant": value}` for results that are not tensors.
        origins: origins by node name of the copy.
    """

    graph_module: fx.GraphModule
    outputs: list[Any]
    origins: dict[str, Origin]


def prepare(graph_module: fx.GraphModule) -> Prepared:
    """Copies `graph_module`; the original stays unchanged.

    In the copy, `select(table, 0, t)` before quantization, transforms and adapters is a constant named after its loop,
    because runtimes and device compilers require constants there. Inverse transforms of unpacked weights are constants
    too, since ONNX has no inverse. Every output is a different node, and none is an input or weight.

    Raises:
        LoopQError: a result of the program is neither a tensor nor a plain value.
    """
    graph, attributes = fx.Graph(), {}
    origins: dict[str, Origin] = {}
    modules: dict[str, RolledLoop] = {}
    copied: dict[fx.Node, fx.Node] = {}
    rows: dict[str, fx.Node] = {}
    outputs: list[Any] = []
    folded = _transformed_weights(graph_module)
    for node in graph_module.graph.nodes:
        if node.op == "output":
            outputs = _copy_outputs(graph, node, copied)
        elif node in folded:
            attributes[f"{node.name}_folded"] = folded[node]
            copied[node] = graph.get_attr(f"{node.name}_folded")
        elif (row := _table_row(graph_module, node)) is not None:
            name, values = row
            if name not in rows:
                attributes[name] = values
                rows[name] = graph.get_attr(name)
            copied[node] = rows[name]
        else:
            if node.op == "call_module":
                modules[str(node.target)] = _copy_loop(graph_module, node, origins)
            if node.op == "get_attr":
                attributes[str(node.target)] = get_tensor(graph_module, str(node.target))
            copied[node] = graph.node_copy(node, copied.__getitem__)
            origins[copied[node].name] = _origin(node)
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    used = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    root = {name: tensor for name, tensor in attributes.items() if name in used}
    return Prepared(fx.GraphModule({**root, **modules}, graph), outputs, origins)


def _copy_loop(graph_module: fx.GraphModule, node: fx.Node, origins: dict[str, Origin]) -> RolledLoop:
    """A copy of the rolled loop; the nodes of its body have names that differ from those outside."""
    loop = graph_module.get_submodule(str(node.target))
    assert isinstance(loop, RolledLoop)
    body = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for inner in loop.body.graph.nodes:
        copied[inner] = body.node_copy(inner, copied.__getitem__)
        if inner.op == "call_function":
            copied[inner].name = f"{node.target}_body_{inner.name}"
            origins[copied[inner].name] = _origin(inner)
    numbers = loop.count, loop.rows, loop.skipped, loop.number
    return RolledLoop(fx.GraphModule({}, body), *numbers, loop.scanned, loop.survival)


def _transformed_weights(graph_module: fx.GraphModule) -> dict[fx.Node, Tensor]:
    """The values of transformed constants: weights after an inverse transform, in programs that are not packed."""
    constant = constant_nodes(graph_module.graph)
    transforms = [n for n in constant if n.target is _loopq.kronecker.default]
    return dict(evaluate(graph_module, transforms))


def _table_row(graph_module: fx.GraphModule, node: fx.Node) -> tuple[str, Tensor] | None:
    """Name and value of the row of a per-loop table that is read at `node`; None for other nodes."""
    if node.target is not _aten.select.int:
        return None
    table, dimension, index = node.args
    if not isinstance(table, fx.Node) or table.op != "get_attr" or dimension != 0 or not isinstance(index, int):
        return None
    if TRANSFORM not in table.meta and not all(user.target in _READERS for user in node.users):
        return None
    values = get_tensor(graph_module, str(table.target)).detach()
    tag = get_tag(node)
    if values.shape[0] == 1:
        suffix = "all_loops" if tag else "row0"
    elif tag and get_state(graph_module).loops.row(tag) == index:
        suffix = f"loop{tag.label.replace('.', '_')}"
    else:
        suffix = f"row{index}"
    return f"{table.target}_{suffix}", values[index].contiguous()


def _copy_outputs(graph: fx.Graph, node: fx.Node, copied: dict[fx.Node, fx.Node]) -> list[Any]:
    slots: list[Any] = []
    unique: dict[fx.Node, int] = {}
    results: list[fx.Node] = []
    for value in node.args[0]:  # type: ignore[union-attr]
        if isinstance(value, fx.Node):
            if value not in unique:
                unique[value] = len(results)
                source = copied[value]
                passed_on = source.op != "call_function"
                results.append(graph.call_function(_aten.clone.default, (source,)) if passed_on else source)
            slots.append(unique[value])
        elif value is None or isinstance(value, bool | int | float | str):
            slots.append({"constant": value})
        else:
            raise LoopQError(f"The program returns a {type(value).__name__}; an ONNX file can only return tensors.")
    if not results:
        raise LoopQError("The program returns no tensor; there is nothing to export.")
    graph.output(tuple(results))
    return slots


def _origin(node: fx.Node) -> Origin:
    tag, calls = get_tag(node), module_calls(node)
    site = node.meta.get(SITE) or (calls[-1][0] if calls else "")
    return Origin(node.name, tag.label if tag else "", site, node.meta.get(BITS))
