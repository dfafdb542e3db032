"""A whole program as one searchable page: every node with its code, loop, module, type, pass, inputs and users.

The list is in the HTML itself, so the browser's own search works too. A few lines of script inside the file hide
entries that a filter leaves out. Nothing is loaded from elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from markupsafe import Markup, escape
from torch import fx

from loopq_compile.analysis.report.render import fill
from loopq_compile.analysis.visualize import role_of
from loopq_compile.graph.keys import MADE_BY
from loopq_compile.graph.loops import get_tag
from loopq_compile.graph.printer import code_of, site_of, source_of
from loopq_compile.graph.rolled import rolled_loops
from loopq_compile.graph.shapes import type_of
from loopq_compile.graph.state import get_state

SHOWN_USERS = 12
"""How many users a node shows at once; a click shows more."""
Values = dict[str, Any]


def browse(graph_module: fx.GraphModule) -> str:
    """The page.

    Args:
        graph_module: a captured, quantized or rolled program.
    """
    state = get_state(graph_module)
    parts = [("", graph_module.graph)]
    parts += [(f"body{loop.number}-", loop.body.graph) for loop in rolled_loops(graph_module)]
    sections = [section for prefix, graph in parts for section in _sections(prefix, graph)]
    nodes = [node for section in sections for node in section["nodes"]]
    method = f"{state.scheme.name} {state.scheme.activation}, method {state.method}" if state.scheme else "as captured"
    return fill(
        "browse.html.jinja",
        title=f"{state.model_name}: {state.loops.describe()}; {method}",
        log=[entry.pass_name for entry in state.log],
        sections=sections,
        count=len(nodes),
        loops=_distinct(node["loop"] for node in nodes),
        modules=_modules(node["site"] for node in nodes),
        passes=_distinct(node["pass"] for node in nodes),
        roles=_distinct(node["role"] for node in nodes),
        shown=SHOWN_USERS,
    )


def _sections(prefix: str, graph: fx.Graph) -> Iterator[Values]:
    """Stretches of one loop tag, in program order; inputs and weights, which come first, have a separate one."""
    current: Values | None = None
    for node in graph.nodes:
        loop = str(get_tag(node) or "")
        title = loop or ("inputs and weights" if node.op in ("placeholder", "get_attr") else "outside the loop")
        title = f"body of rolled loop {prefix[4:-1]}: {title}" if prefix else title
        if current is None or current["title"] != title:
            if current is not None:
                yield current
            current = {"title": title, "nodes": []}
        current["nodes"].append(_entry(prefix, node, loop))
    if current is not None:
        yield current


def _entry(prefix: str, node: fx.Node, loop: str) -> Values:
    return {
        "id": f"n-{prefix}{node.name}",
        "name": node.name,
        "code": _linked(prefix, node),
        "loop": loop,
        "site": site_of(node),
        "type": type_of(node),
        "pass": node.meta.get(MADE_BY, ""),
        "role": "input" if node.op == "placeholder" else "output" if node.op == "output" else role_of(node),
        "source": source_of(node),
        "users": [{"id": f"n-{prefix}{user.name}", "name": user.name} for user in node.users],
    }


def _linked(prefix: str, node: fx.Node) -> Markup:
    """The statement of a node, with links to its inputs."""
    code, inputs = code_of(node), {source.name for source in node.all_input_nodes}
    made, end = Markup(""), 0
    for match in re.finditer(r"(?<![\w.])[A-Za-z_]\w*(?![\w.])", code):
        if match[0] in inputs:
            made += escape(code[end : match.start()])
            made += Markup('<a href="#{0}">{1}</a>').format(f"n-{prefix}{match[0]}", match[0])
            end = match.end()
    return made + escape(code[end:])


def _distinct(values: Iterator[str]) -> Sequence[str]:
    return list(dict.fromkeys(value for value in values if value))


def _modules(sites: Iterator[str]) -> Sequence[str]:
    """Every module that is, or holds, a site."""
    found: dict[str, None] = {}
    for site in _distinct(sites):
        parts = site.split(".")
        found |= dict.fromkeys(".".join(parts[: i + 1]) for i in range(len(parts)))
    return sorted(found)
