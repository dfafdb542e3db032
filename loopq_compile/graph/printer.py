"""A program as Python: runnable, stable from run to run, with a comment after every node."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any

import torch
from torch import fx

from loopq_compile.graph.keys import MADE_BY, SITE, SOURCE
from loopq_compile.graph.loops import LoopTag, get_tag
from loopq_compile.graph.rolled import rolled_loops
from loopq_compile.graph.shapes import type_of
from loopq_compile.graph.state import get_state

_COMMENT_COLUMN = 88
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in .*\n(.*)')
_LIBRARY = str(PurePath(torch.__file__).parent)


def print_graph(graph_module: fx.GraphModule) -> str:
    """The whole graph as the source of a `forward` function.

    Each line ends in a comment: the loop, the site (module or quantized linear), the type, and the pass that made the
    node, if one did. To run the text, put `torch` and `inf` in scope; `self` is the graph module.
    """
    state = get_state(graph_module)
    method = f"{state.scheme.name} {state.scheme.activation}, method {state.method}" if state.scheme else "as captured"
    lines = [f"# {state.model_name}: {state.loops.describe()}; {method}"]
    if state.log:
        lines.append(f"# constructed by {' -> '.join(entry.pass_name for entry in state.log)}")
    arguments = [node.name for node in graph_module.graph.nodes if node.op == "placeholder"]
    lines += [f"def forward(self, {', '.join(arguments)}):"]
    lines += print_nodes(graph_module.graph.nodes)
    for loop in rolled_loops(graph_module):
        arguments = [node.name for node in loop.body.graph.nodes if node.op == "placeholder"]
        lines += [
            "",
            f"# the body of loop_{loop.number}, {loop.count} iterations",
            f"def body({', '.join(arguments)}):",
        ]
        lines += print_nodes(loop.body.graph.nodes)
    return "\n".join(lines) + "\n"


def print_nodes(nodes: Iterable[fx.Node]) -> list[str]:
    """Lines for some nodes of a graph, with a headline where a loop begins or ends."""
    lines: list[str] = []
    current: LoopTag | None = None
    for node in nodes:
        tag = get_tag(node)
        if node.op in ("placeholder", "get_attr") and not lines:
            current = tag
        if tag != current:
            lines += ["", f"    # ---- {tag or 'outside the loop'} " + "-" * 40]
            current = tag
        if node.op != "placeholder":
            lines.append(_line(node))
    return lines


def print_transition(graph_module: fx.GraphModule, boundary: int = 0, context: int = 6) -> str:
    """The lines around one step from loop `boundary` to the next, where the recurrent state is handed over."""
    nodes = [node for node in graph_module.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    edges = get_state(graph_module).loops.boundaries
    if not edges:
        return "no loop transition"
    edge = edges[boundary]
    state = max(i for i, node in enumerate(nodes) if node.name in edge.state)
    last = min((i for i, node in enumerate(nodes) if node.name in edge.consumers), default=state)
    lines = print_nodes(nodes[max(0, state - context) : last + context + 1])
    return "\n".join(line for line in lines if line)


def site_of(node: fx.Node) -> str:
    """The linear or group a node serves, else the module it comes from."""
    if node.meta.get(SITE):
        return node.meta[SITE]
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = stack[-1][0] if stack else ""
    return "" if path.startswith("_empty") else path.split("@")[0]


def source_of(node: fx.Node) -> str:
    """Where the model computes this: `ouro.py:120: x = self.up(y)`; "" for what a pass made, and constants."""
    if SOURCE in node.meta:
        return str(node.meta[SOURCE])
    if node.meta.get(MADE_BY):
        return ""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    lines = [(file, line, code) for file, line, code in frames if not file.startswith(_LIBRARY)]
    return f"{PurePath(lines[-1][0]).name}:{lines[-1][1]}: {lines[-1][2].strip()}" if lines else ""


def code_of(node: fx.Node) -> str:
    """A node as one statement of Python, without comment."""
    if node.op == "output":
        return f"return {_value(node.args[0])}"
    if node.op == "placeholder":
        return f"{node.name} = {node.target}"
    if node.op == "get_attr":
        if all(part.isidentifier() for part in str(node.target).split(".")):
            return f"{node.name} = self.{node.target}"
        return f'{node.name} = operator.attrgetter("{node.target}")(self)'
    arguments = [_value(argument) for argument in node.args]
    arguments += [f"{name}={_value(argument)}" for name, argument in node.kwargs.items()]
    function = f"self.{node.target}" if node.op == "call_module" else _function(node.target)
    return f"{node.name} = {function}({', '.join(arguments)})"


def _line(node: fx.Node) -> str:
    code = "    " + code_of(node)
    if node.op == "output":
        return code
    tag, site, made_by = get_tag(node), site_of(node), node.meta.get(MADE_BY)
    notes = [str(tag or ""), f"site={site}" if site and node.op != "get_attr" else "", type_of(node)]
    notes += [f"by {made_by}" if made_by else ""]
    comment = " ".join(note for note in notes if note)
    return f"{code.ljust(_COMMENT_COLUMN)}  # {comment}" if comment else code


def _function(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return f"torch.ops.{target}"
    module = getattr(target, "__module__", "").replace("_operator", "operator")
    return f"{module}.{getattr(target, '__name__', target)}"


def _value(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, list | tuple):
        inner = ", ".join(map(_value, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, torch.device):
        return f'torch.device("{value}")'
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
        return str(value)
    return repr(value)
