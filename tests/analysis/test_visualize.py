"""Pictures of a loop's graph."""

from __future__ import annotations

import shutil
import sys
import xml.etree.ElementTree as ET

import networkx as nx
import pytest

from loopq_compile.analysis.visualize import COLOURS, loop_graph, render_svg, to_dot
from loopq_compile.capture.to_graph import capture
from loopq_compile.errors import LoopQError
from loopq_compile.passes.loops.tag_loops import TagLoops
from loopq_compile.pipeline import Pipeline
from tests.tiny import tiny_model, tiny_program, tokens


def graph(loop: int | None = None) -> nx.DiGraph:
    return loop_graph(tiny_program().graph_module, loop)


def roles(drawn: nx.DiGraph) -> dict[str, int]:
    found = [facts["role"] for _, facts in drawn.nodes(data=True)]
    return {role: found.count(role) for role in COLOURS}


def test_each_loop_shows_its_linears_quantization_and_neighbours() -> None:
    for loop in range(3):
        drawn = graph(loop)
        assert nx.is_directed_acyclic_graph(drawn)
        count = roles(drawn)
        assert count["linear"] == 8  # seven of the block, and the exit gate
        assert count["quantize"] > 7 and count["weight"] > 8 and count["output"] >= 1
        assert all(drawn.degree(node) for node in drawn)
    into = [facts["label"] for _, facts in graph(1).nodes(data=True) if facts["role"] == "input"]
    assert any(label.startswith("from loop=0") for label in into)


def test_tooltips_say_loop_site_and_pass() -> None:
    tips = [facts["tooltip"] for _, facts in graph(1).nodes(data=True)]
    assert any("loop=1" in tip and "site=layers.0.down" in tip for tip in tips)
    assert any("by insert-activation-qdq" in tip for tip in tips)


def test_dot_text_is_stable_balanced_and_escaped() -> None:
    text = to_dot(graph(1), 'a "title"')
    assert text == to_dot(graph(1), 'a "title"')
    assert text.startswith("digraph") and text.count("{") == text.count("}")
    assert r"a \"title\"" in text and COLOURS["linear"] in text


def test_a_program_without_loop_is_drawn_whole() -> None:
    graph_module = Pipeline([TagLoops()]).run(capture(tiny_model(loops=1), tokens()))
    assert roles(loop_graph(graph_module))["linear"] == 9
    with pytest.raises(LoopQError, match="no loop"):
        loop_graph(graph_module, 1)


@pytest.mark.parametrize("loop", [-1, 3])
def test_loops_are_counted_from_zero(loop: int) -> None:
    with pytest.raises(LoopQError, match="runs 3 times"):
        graph(loop)


@pytest.mark.parametrize("way", ["pygraphviz", "dot"])
def test_svg_is_well_formed(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "pygraphviz":
        pytest.importorskip("pygraphviz")
    elif shutil.which("dot") is None:
        pytest.skip("needs the dot program")
    else:
        monkeypatch.setitem(sys.modules, "pygraphviz", None)
    svg = render_svg(to_dot(graph(0), "loop 0"))
    assert ET.fromstring(svg).tag.endswith("svg")
    assert "layers.0.down" in svg


def test_svg_without_graphviz_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pygraphviz", None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(LoopQError, match=r"loopq-compile\[plot\]"):
        render_svg("digraph { a -> b }")
