"""Graphs as JSON. Nothing is pickled, and loading a file runs no code from it: operators are looked up by name among
PyTorch's and this package's, and arguments are plain values."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor, fx

import loopq_compile.operators  # noqa: F401  (registers the operators that graphs refer to)
from loopq_compile.errors import LoopQError
from loopq_compile.graph.keys import BITS, GROUP, LEARN, MADE_BY, SITE, SOURCE, TRANSFORM, TYPE
from loopq_compile.graph.loops import LoopTag, get_tag, set_tag
from loopq_compile.graph.names import safe_name, shown_name
from loopq_compile.graph.printer import site_of, source_of
from loopq_compile.graph.rolled import RolledLoop

_NAMESPACES = ("aten", "loopq", "prims")
_FORBIDDEN = ("from_file",)
_FUNCTIONS = {
    f"{module.__name__.removeprefix('_')}.{name}": getattr(module, name)
    for module, names in (
        (operator, "getitem add sub mul floordiv truediv mod neg pow eq ne lt le gt ge and_ or_ not_"),
        (math, "ceil floor sqrt trunc"),
        (torch, "sym_float sym_int sym_ite sym_max sym_min sym_not sym_sqrt"),
    )
    for name in names.split()
    if hasattr(module, name)
}
_KEPT = (SITE, GROUP, BITS, TRANSFORM, LEARN, MADE_BY, TYPE, SOURCE)


def graph_to_json(graph: fx.Graph) -> list[dict[str, Any]]:
    """One dict per node.

    Raises:
        LoopQError: a node is a function that files cannot name, such as a Python function of a custom pass.
    """
    return [_node_to_json(node) for node in graph.nodes]


def graph_from_json(data: list[dict[str, Any]]) -> fx.Graph:
    """Inverse of `graph_to_json`.

    Raises:
        LoopQError: the data names unknown operators, or nodes before they exist.
    """
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for entry in data:
        kind, target = entry["op"], entry["target"]
        if kind not in ("placeholder", "get_attr", "call_function", "call_module", "output"):
            raise LoopQError(f"Node {entry.get('name')!r} has the unknown kind {kind!r}.")
        args, kwargs = _decode(entry["args"], nodes), _decode(entry["kwargs"], nodes)
        function = _lookup(target) if kind == "call_function" else safe_name(target) if kind == "get_attr" else target
        node = graph.create_node(kind, function, tuple(args), kwargs, name=entry["name"])
        nodes[entry["name"]] = node
        for key in _KEPT:
            if key in entry:
                node.meta[key] = _checked(entry, key)
        if "tag" in entry:
            set_tag(node, LoopTag(*map(tuple, entry["tag"])))
        if entry.get("module"):
            node.meta["nn_module_stack"] = {entry["module"]: (entry["module"], "")}
    return graph


def _checked(entry: dict[str, Any], key: str) -> Any:
    kind = int if key == BITS else str
    if not isinstance(entry[key], kind):
        raise LoopQError(f"Node {entry['name']!r} has {entry[key]!r} as {key}")
    return entry[key]


def rolled_from_json(data: list[dict[str, Any]]) -> dict[str, RolledLoop]:
    """The rolled loops that the nodes of `graph_to_json` call, by name.

    Raises:
        LoopQError: as in `graph_from_json`.
    """
    loops = {entry["target"]: dict(entry["rolled"]) for entry in data if entry["op"] == "call_module"}
    return {
        name: RolledLoop(fx.GraphModule({}, graph_from_json(loop.pop("body"))), **loop) for name, loop in loops.items()
    }


def _rolled_to_json(node: fx.Node) -> dict[str, Any]:
    owner = node.graph.owning_module
    loop = owner.get_submodule(str(node.target)) if owner is not None else None
    if not isinstance(loop, RolledLoop):
        raise LoopQError(f"Node {node.name!r} calls the module {node.target!r}, which a saved program cannot hold.")
    numbers: dict[str, Any] = {"count": loop.count, "rows": loop.rows, "skipped": loop.skipped, "number": loop.number}
    if loop.scanned:
        numbers["scanned"] = list(loop.scanned)
    if loop.survival is not None:
        numbers["survival"] = loop.survival
    return {**numbers, "body": graph_to_json(loop.body.graph)}


def _node_to_json(node: fx.Node) -> dict[str, Any]:
    if node.op == "call_function":
        target = _name_of(node)
    elif node.op in ("placeholder", "get_attr", "output", "call_module"):
        target = shown_name(str(node.target)) if node.op == "get_attr" else str(node.target)
    else:
        raise LoopQError(f"Node {node.name!r} ({node.op}) cannot be saved: programs hold only operators and constants.")
    entry = {
        "name": node.name,
        "op": node.op,
        "target": target,
        "args": _encode(list(node.args), node),
        "kwargs": _encode(node.kwargs, node),
    }
    if node.op == "call_module":
        entry["rolled"] = _rolled_to_json(node)
    tag = get_tag(node)
    if tag is not None:
        entry["tag"] = [list(tag.loops), list(tag.index)]
    if node.op == "call_function" and site_of(node) != node.meta.get(SITE):
        entry["module"] = site_of(node)
    kept = {**node.meta, SOURCE: source_of(node)}
    return entry | {key: kept[key] for key in _KEPT if kept.get(key)}


def _name_of(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and target.namespace in _NAMESPACES:
        return str(target)
    for name, function in _FUNCTIONS.items():
        if function is target:
            return name
    raise LoopQError(
        f"Node {node.name!r} calls {target}, which a saved program cannot name; use operators of torch.ops."
    )


def _lookup(name: str) -> Any:
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    namespace, _, rest = name.partition(".")
    packet, _, overload = rest.partition(".")
    if namespace in _NAMESPACES and packet not in _FORBIDDEN and packet.isidentifier() and overload.isidentifier():
        found = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload, None)
        if isinstance(found, torch._ops.OpOverload):
            return found
    raise LoopQError(f"The program uses the operator {name!r}, which this version of PyTorch or loopq_compile lacks.")


def _encode(value: Any, node: fx.Node) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, tuple):
        return {"tuple": [_encode(item, node) for item in value]}
    if isinstance(value, list):
        return [_encode(item, node) for item in value]
    if isinstance(value, dict):
        return {"dict": {str(key): _encode(item, node) for key, item in value.items()}}
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": None}  # where the program will lie
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    kind = "a tensor" if isinstance(value, Tensor) else type(value).__name__
    raise LoopQError(f"Node {node.name!r} has {kind} as argument, which a saved program cannot hold.")


def _decode(value: Any, nodes: dict[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    (kind, inner), *_ = value.items()
    if kind == "node":
        if inner not in nodes:
            raise LoopQError(f"The graph refers to the node {inner!r} before it is defined.")
        return nodes[inner]
    if kind == "tuple":
        return tuple(_decode(inner, nodes))
    if kind == "dict":
        return {key: _decode(item, nodes) for key, item in inner.items()}
    if kind == "device":
        return torch.device("cpu")  # programs are read there; files of version 0.1 named a device
    if kind == "float":
        return float(inner)
    found = getattr(torch, inner, None) if kind == "torch" else None
    if not isinstance(found, torch.dtype | torch.layout | torch.memory_format):
        raise LoopQError(f"The graph holds an unknown value {value!r}.")
    return found
