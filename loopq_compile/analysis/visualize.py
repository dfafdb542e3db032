"""Pictures of one loop's graph: DOT text, and SVG if Graphviz is installed.

SVG needs Graphviz: the Python package `pygraphviz` (version 2.0 and newer include it, extra `plot`), or a `dot`
program.
"""

from __future__ import annotations

import operator
import shutil
import subprocess
import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import fx

from loopq_compile.errors import LoopQError
from loopq_compile.graph.keys import MADE_BY
from loopq_compile.graph.loops import get_tag
from loopq_compile.graph.names import shown_name
from loopq_compile.graph.printer import site_of
from loopq_compile.graph.shapes import type_of
from loopq_compile.graph.state import get_state

if TYPE_CHECKING:
    import networkx as nx

COLOURS = {
    "input": "#ffffff",
    "output": "#ffffff",
    "weight": "#e0e0e0",
    "quantize": "#ffcc80",
    "linear": "#90caf9",
    "other": "#f1f8e9",
}
"""Fill colour by role."""
_NO_TENSOR = (torch.ops.aten.sym_size.int, operator.add, operator.sub, operator.mul, operator.floordiv)


def loop_graph(graph_module: fx.GraphModule, loop: int | None = None) -> nx.DiGraph:
    """The data flow of one iteration of the main loop, or of the whole program if there is no loop.

    Nodes have the attributes `role` (a key of `COLOURS`), `label`, `tooltip` and `module`. Values from outside and
    readers of the results are nodes of role "input" and "output". Size arithmetic is left out.

    Args:
        graph_module: a captured program.
        loop: iteration, counted from 0. None: the first, or the whole graph of a program without loops.

    Raises:
        LoopQError: the main loop has no such iteration.
    """
    structure = get_state(graph_module).loops
    if structure.main is None:
        if loop not in (None, 0):
            raise LoopQError(f"There is no loop {loop}: this program has no loop.")
        inside = [node for node in graph_module.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    else:
        loop = 0 if loop is None else loop
        if not 0 <= loop < structure.count:
            raise LoopQError(f"There is no loop {loop}: the main loop runs {structure.count} times, counted from 0.")
        inside = [
            node
            for node in graph_module.graph.nodes
            if (tag := get_tag(node)) and tag.loops[0] == 0 and tag.index[0] == loop
        ]
    try:
        import networkx as nx
    except ImportError as error:
        raise LoopQError("Pictures of graphs need networkx: pip install 'loopq-compile[plot]'.") from error
    graph = nx.DiGraph()
    shown = {node for node in inside if not _is_size(node)}
    for node in inside:
        if node in shown:
            _add(graph, node, role_of(node), site_of(node))
    for node in inside:
        if node in shown:
            _connect(graph, node, shown)
    return graph


def to_dot(graph: nx.DiGraph, title: str = "") -> str:
    """`graph` as DOT text, top to bottom, modules as boxes around their nodes."""
    lines = [
        "digraph loop {",
        f'  graph [rankdir=TB, label="{_escape(title)}", labelloc=t, fontname="Helvetica", fontsize=16, ranksep=0.3];',
        '  node [shape=box, style="rounded,filled", fontname="Helvetica", fontsize=10, height=0.3, color="#616161"];',
        '  edge [color="#757575", arrowsize=0.6];',
        *_boxes(graph, "", list(graph), 1),
        *(f'  "{_escape(a)}" -> "{_escape(b)}";' for a, b in graph.edges),
        "}",
    ]
    return "\n".join(lines) + "\n"


def render_svg(dot: str) -> str:
    """DOT text laid out by Graphviz, as SVG.

    Raises:
        LoopQError: neither pygraphviz nor the program `dot` is installed, or Graphviz fails.
    """
    try:
        import pygraphviz
    except ImportError:
        return _render_with_program(dot)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return pygraphviz.AGraph(string=dot).draw(format="svg", prog="dot").decode("utf-8")
        except (OSError, ValueError) as error:
            raise LoopQError(f"Graphviz cannot draw this graph: {error}") from error


def _render_with_program(dot: str) -> str:
    if shutil.which("dot") is None:
        raise LoopQError("SVG needs Graphviz: pip install 'loopq-compile[plot]'. DOT text (--dot) always works.")
    done = subprocess.run(["dot", "-Tsvg"], input=dot, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LoopQError(f"Graphviz cannot draw this graph: {done.stderr.strip()[:300]}")
    return done.stdout


def _is_size(node: fx.Node) -> bool:
    """Nodes that compute sizes, not tensors."""
    return node.target in _NO_TENSOR


def _is_constant(node: fx.Node) -> bool:
    """Weights, and what is computed only from weights."""
    return node.op == "get_attr" or bool(node.all_input_nodes and all(map(_is_constant, node.all_input_nodes)))


def role_of(node: fx.Node) -> str:
    """A key of `COLOURS`: what a node is for."""
    if node.op == "get_attr":
        return "weight"
    namespace = str(node.target).split(".")[0]
    if namespace in ("loopq", "quantized_decomposed", "torchao"):
        return "quantize"
    return "linear" if node.target is torch.ops.aten.linear.default else "other"


def _add(graph: nx.DiGraph, node: fx.Node, role: str, module: str, name: str | None = None, note: str = "") -> str:
    name = name or node.name
    plain = node.op in ("get_attr", "placeholder")
    tag = str(get_tag(node) or "outside the loop")
    facts = [node.name, str(node.target).removesuffix(".default"), tag]
    facts += [f"site={site_of(node)}" if site_of(node) else "", type_of(node)]
    facts += [f"by {node.meta[MADE_BY]}" if node.meta.get(MADE_BY) else ""]
    operator_name = getattr(node.target, "__name__", "").split(".")[0]
    what = shown_name(str(node.target)).rpartition(".")[2] if plain else operator_name
    label = "\n".join(filter(None, [note, what or str(node.target), type_of(node)]))
    graph.add_node(name, role=role, module=module, label=label, tooltip="\n".join(filter(None, facts)))
    return name


def _connect(graph: nx.DiGraph, node: fx.Node, shown: set[fx.Node]) -> None:
    """Edges into `node`, and from it to nodes outside."""
    for source in node.all_input_nodes:
        if source in shown:
            graph.add_edge(source.name, node.name)
        elif _is_constant(source):
            _connect_constant(graph, source, node, node.name, site_of(node))
        elif not _is_size(source):
            graph.add_edge(_add(graph, source, "input", "", note=f"from {get_tag(source) or 'outside'}"), node.name)
    for user in node.users:
        if user not in shown and not _is_size(user):
            note = f"to {get_tag(user) or 'outside'}"
            graph.add_edge(node.name, _add(graph, user, "output", "", f"to {user.name}", note))


def _connect_constant(graph: nx.DiGraph, source: fx.Node, user: fx.Node, target: str, module: str) -> None:
    """Shows weights, and what is computed from them, next to the node that reads them."""
    made = _add(graph, source, role_of(source), module, f"{source.name} for {user.name}")
    graph.add_edge(made, target)
    for inner in source.all_input_nodes:
        _connect_constant(graph, inner, user, made, module)


def _boxes(graph: nx.DiGraph, prefix: str, names: Iterable[str], depth: int) -> Iterator[str]:
    """Nodes as DOT, those of one module inside a box of that name."""
    indent = "  " * depth
    inner: dict[str, list[str]] = {}
    for name in names:
        rest = graph.nodes[name]["module"].removeprefix(prefix)
        if rest:
            inner.setdefault(rest.split(".")[0], []).append(name)
        else:
            yield indent + _dot_node(name, graph.nodes[name])
    for part, members in inner.items():
        yield f'{indent}subgraph "cluster_{_escape(prefix + part)}" {{'
        yield f'{indent}  label="{_escape(part)}"; labeljust=l; fontsize=11; color="#bdbdbd"; style=rounded;'
        yield from _boxes(graph, f"{prefix}{part}.", [m for m in members if _below(graph, m, prefix + part)], depth + 1)
        yield from (f"{indent}  {_dot_node(m, graph.nodes[m])}" for m in members if not _below(graph, m, prefix + part))
        yield f"{indent}}}"


def _below(graph: nx.DiGraph, name: str, module: str) -> bool:
    return graph.nodes[name]["module"].startswith(module + ".")


def _dot_node(name: str, facts: dict[str, str]) -> str:
    style = ', style="rounded,filled,dashed"' if facts["role"] in ("input", "output") else ""
    colour = COLOURS[facts["role"]]
    return (
        f'"{_escape(name)}" [label="{_escape(facts["label"])}", tooltip="{_escape(facts["tooltip"])}", '
        f'fillcolor="{colour}"{style}];'
    )


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
