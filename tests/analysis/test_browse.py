"""The page for browsing a program: complete, escaped, and quick to search."""

from __future__ import annotations

import re

import pytest
import torch
from torch import fx
from typer.testing import CliRunner

import loopq_compile as lq
from loopq_compile.analysis.report import browse, write_page
from loopq_compile.cli import app
from loopq_compile.graph.loops import LoopTag, get_tag, set_tag
from loopq_compile.graph.printer import source_of
from loopq_compile.graph.state import CompilerState, attach_state, get_state
from tests.pages import LEGIBILITY, OVERFLOW, browser
from tests.tiny import tiny_model, tiny_program, tokens


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browse")
    tiny_program().save(folder / "p")
    done = CliRunner().invoke(app, ["inspect", str(folder / "p"), "--html", str(folder / "page.html")])
    assert done.exit_code == 0 and "page.html" in done.output
    return folder / "page.html"


def test_every_node_is_there_with_links_both_ways(saved):
    text = saved.read_text(encoding="utf-8")
    for node in tiny_program().graph_module.graph.nodes:
        entry = re.search(rf'<div class="n[^>]*id="n-{node.name}".*?</div>', text, re.DOTALL)
        assert entry, node.name
        links = re.findall(r'href="#n-([^"]+)"', entry[0])
        expected = [source.name for source in node.all_input_nodes] + [user.name for user in node.users]
        assert set(links) == set(expected), node.name
    assert text.count('class="n ') == len(tiny_program().graph_module.graph.nodes)
    assert "http" not in text and "src=" not in text


def test_saved_programs_know_the_line_of_the_model(saved):
    text = saved.read_text(encoding="utf-8")
    assert re.search(r"<span>tiny\.py:\d+: x = x \+ self\.attn\(self\.norm1\(x\)\)</span>", text)
    made = [n for n in tiny_program().graph_module.graph.nodes if n.meta.get("loopq_pass")]
    assert made and not any(map(source_of, made)), "passes have no line of the model"


def test_names_from_files_are_text_and_nothing_else(tmp_path):
    program = lq.compile(tiny_model(), tokens(), scheme="w4a8", method="symmetric")
    sly = "</script><script>alert(1)</script>"
    for node in program.graph_module.graph.nodes:
        node.meta["loopq_site"] = sly
    get_state(program.graph_module).model_name = sly
    file = program.browse(tmp_path / "page.html")
    assert file.read_text().count("<script") == 1
    with browser(tmp_path / "profile") as page:
        page.open(file)
        assert page.complaints == [] and page.evaluate(
            "document.querySelector('.n p').textContent.includes('alert(1)')"
        )


def test_the_body_of_a_rolled_loop_is_there_too(tmp_path):
    from loopq_compile.passes.loops.roll_loops import RollLoops

    program = lq.compile(
        tiny_model(), tokens(), scheme="w4a8", method=lq.Pipeline([*lq.pipelines.symmetric(), RollLoops()])
    )
    text = browse(program.graph_module)
    assert "body of rolled loop 0" in text
    ids = re.findall(r'id="(n-[^"]+)"', text)
    assert len(ids) == len(set(ids)) and set(re.findall(r'href="#([^"]+)"', text)) <= set(ids)


def click_through(page):
    """Numbers of shown nodes under several filters."""
    page.evaluate(
        "window.use = (name, value) => { document.getElementById(name).value = value; filter(); "
        "return document.querySelectorAll('.n:not([hidden])').length; }"
    )
    return {
        (name, value): (page.evaluate(f"use({name!r}, {value!r})"), page.evaluate(f"use({name!r}, '')"))
        for name, value in (
            ("loop", "loop=1"),
            ("module", "layers.0.attn"),
            ("pass", "insert-activation-qdq"),
            ("role", "linear"),
            ("words", "LINEAR layers.0.down"),
            ("words", "no such node"),
        )
    }


def test_filters_show_what_they_say(saved, tmp_path):
    nodes = list(tiny_program().graph_module.graph.nodes)
    with browser(tmp_path) as page:
        page.open(saved)
        found = click_through(page)
        assert {everything for _, everything in found.values()} == {len(nodes)}
        assert found["loop", "loop=1"][0] == sum(str(get_tag(n)) == "loop=1" for n in nodes) > 30
        assert found["pass", "insert-activation-qdq"][0] == sum(
            n.meta.get("loopq_pass") == "insert-activation-qdq" for n in nodes
        )
        linears = torch.ops.aten.linear.default
        assert found["role", "linear"][0] == sum(n.target is linears for n in nodes)
        assert found["words", "LINEAR layers.0.down"][0] >= 3 and found["words", "no such node"][0] == 0
        assert 10 < found["module", "layers.0.attn"][0] < len(nodes)
        page.evaluate("use('words', 'no such node')")
        assert page.evaluate("document.getElementById('count').textContent") == f"0 of {len(nodes)} nodes"
        page.evaluate("location.hash = '#n-linear'")
        page.evaluate("new Promise(done => setTimeout(done, 100))")
        assert page.evaluate("document.getElementById('n-linear').checkVisibility()"), "a link shows a hidden node"
        assert page.complaints == [] and {url.split("#")[0] for url in page.requests} == {saved.as_uri()}


@pytest.mark.parametrize(("width", "dark"), [(1280, True), (380, False)])
def test_it_is_legible_and_not_wider_than_the_window(saved, width, dark, tmp_path):
    with browser(tmp_path) as page:
        page.window(width, dark=dark)
        page.open(saved)
        widths, contrast = page.evaluate(OVERFLOW), page.evaluate(LEGIBILITY)
        assert widths["page"] <= widths["window"] == width and widths["outside"] == []
        assert contrast["seen"] > 1000 and contrast["ratio"] > 4.5, contrast


def test_thousands_of_nodes_are_no_trouble(tmp_path):
    graph = fx.Graph()
    x = graph.placeholder("x")
    for i in range(6000):
        x = graph.call_function(torch.ops.aten.add.Tensor, (x, 1))
        x.meta["loopq_site"] = f"layers.{i % 7}.norm"
        set_tag(x, LoopTag((0,), (i // 1000,)))
    graph.output(x)
    graph_module = fx.GraphModule({}, graph)
    attach_state(graph_module, CompilerState(get_state(tiny_program().graph_module).signature, "long"))
    file = write_page(tmp_path / "page.html", browse(graph_module))
    with browser(tmp_path / "profile") as page:
        page.open(file)
        spent = "(start => { use('words', 'layers.3 loop=5'); return performance.now() - start; })(performance.now())"
        found = click_through(page)
        assert found["loop", "loop=1"] == (1000, 6002)
        assert page.evaluate(spent) < 3000, "milliseconds"
