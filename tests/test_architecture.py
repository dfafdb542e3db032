"""Imports run one way, late ones and those for types included: a reader of a room need not know the rooms above it."""

from __future__ import annotations

import ast
from pathlib import Path

import networkx as nx

ROOT = Path(__file__).parent.parent
HOMES = {"loopq_compile": "loopq_compile", "passes": "loopq_compile.passes", "backends": "loopq_compile.backends"}
ORDER = [
    "_version",
    "errors",
    "registry",
    "processes",
    "progress",
    "memory",
    "operators",
    "graph",
    "storage",
    "capture",
    "calibration",
    "solvers",
    "passes",
    "debugging",
    "pipeline",
    "planning",
    "methods",
    "generation",
    "backends",
    "exports",
    "program",
    "compiler",
    "models",
    "bundled",
    "sources",
    "evaluation",
    "analysis",
    "bench",
    "cli",
]
"""Rooms and modules of the package, lowest first; each imports only those before it."""
FACADES = {("program", "analysis")}
"""Methods of `Program` that reach up when they are called."""


def imports() -> nx.DiGraph:
    """An edge from every module to each module of the package that it imports anywhere."""
    files = {}
    for folder, package in HOMES.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            files[".".join(part for part in parts if part != "__init__")] = path
    graph = nx.DiGraph()
    for module, path in files.items():
        graph.add_node(module)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for name in _imported(node, set(files)):
                if name != module:
                    graph.add_edge(module, name, line=node.lineno)
    return graph


def _imported(node: ast.AST, modules: set[str]) -> list[str]:
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module:
        whole = [f"{node.module}.{alias.name}" for alias in node.names]
        names = [name if name in modules else node.module for name in whole]
    else:
        return []
    return [name for name in names if name in modules]


def room(module: str) -> str:
    """Name of the room or module right below the package; "" for the package itself."""
    return [*module.split("."), ""][1]


def test_no_circles() -> None:
    circles = [sorted(found) for found in nx.strongly_connected_components(imports()) if len(found) > 1]
    assert not circles


def test_imports_run_one_way() -> None:
    wrong = []
    for module, other, line in imports().edges(data="line"):
        here, there = room(module), room(other)
        if here and (here, there) not in FACADES and (not there or ORDER.index(here) < ORDER.index(there)):
            wrong.append(f"{module}:{line} imports {other}")
    assert not wrong


def test_the_rooms_are_those_of_the_order() -> None:
    here = {room(module) for module in imports()} - {""}
    assert here == set(ORDER)
    assert len([path for path in (ROOT / "loopq_compile").glob("*.py")]) <= 14
