"""Reports: one file, no network, the right numbers in it."""

import json
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
import torch
from typer.testing import CliRunner

import loopq_compile as lq
from loopq_compile.analysis.report import measure, render
from loopq_compile.analysis.report.measure import carry, drift
from loopq_compile.analysis.report.render import cells, plot, write_page
from loopq_compile.analysis.report.render import trajectory as trajectory_svg
from loopq_compile.analysis.summary import short_names
from loopq_compile.capture.to_graph import capture
from loopq_compile.cli import app
from loopq_compile.graph.state import get_state
from loopq_compile.methods import reference_graph
from tests.pages import LEGIBILITY, OVERFLOW, browser
from tests.tiny import tiny_model, tiny_program, tokens

VOID = {"meta", "br", "rect", "line", "link", "img", "input", "polyline"}


class Page(HTMLParser):
    """Checks that tags are balanced; collects tables, headings and everything that could access the network."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.outside, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        links = [value for name, value in attrs if name in ("src", "href", "action")]
        self.outside += [link for link in links if not link.startswith("#")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert tag in VOID or self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def count(self, tag, kind=None):
        return sum(t == tag and (kind is None or a.get("class") == kind) for t, a in self.tags)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    file = tmp_path_factory.mktemp("report") / "report.html"
    others = {"<b>sly</b>": tiny_program("w8a8", "symmetric")}
    return tiny_program().report(file, model=tiny_model(), tokens=[tokens(5, 1, 12)], others=others, samples=1)


def test_the_page_is_whole_and_needs_nothing_else(written):
    text = written.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == [] and page.outside == [] and page.count("script") == 0
    assert "http" not in text and "@import" not in text and "prefers-color-scheme: dark" in text
    assert "<b>sly</b>" not in text and "<b>sly</b>" in page.text, "names are escaped"


def test_the_page_has_every_part_for_every_program(written):
    page = Page(written.read_text(encoding="utf-8"))
    assert page.count("table", "heatmap") == 2 * 5
    for kind in ("carry", "parts", "worst"):
        assert page.count("table", kind) == 2
    assert page.count("polyline") == 2, "one line a program along the trajectory"
    assert page.count("line", "mark") >= 2, "two transitions at least"
    assert any(attrs.get("title") == "layers.0.down" for _, attrs in page.tags), "the whole name of a row"
    assert "insert-las" in page.text and "Sample 1" in page.text
    for loop in range(3):
        assert f"loop {loop}" in page.text
    assert "top-1 agreement" in page.text and page.text.count("KL, nats") == 3


@pytest.fixture(scope="module")
def full():
    """Numbers of two programs, one of which shows everything that calibration stores."""
    program, model = tiny_program("w4a4", "las", "static"), tiny_model()
    found = measure(program, model, [tokens(5, 1, 12)])
    curve = [{"step": 10 * i, "validation": 0.3 / (i + 1)} for i in range(30)]
    scores = [{"layers.0.down": 0.7, "layers.0.gate+up": 0.2}, {"layers.0.gate+up": 0.4}]
    learned = found | {"curve": [curve, curve[:9]], "selected": {"groups": ["layers.0.down"], "scores": scores}}
    return {"a program with quite a long name": learned, "other": found}


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (380, False)])
def test_chromium_shows_it_whole_and_legible(full, width, dark, tmp_path):
    file = write_page(tmp_path / "report.html", render(full))
    with browser(tmp_path / "profile") as page:
        page.window(width, dark=dark)
        page.open(file)
        assert page.complaints == []
        assert page.requests == [file.as_uri()], "nothing but the file itself"
        widths = page.evaluate(OVERFLOW)
        assert widths["page"] <= widths["window"] == width and widths["outside"] == []
        contrast = page.evaluate(LEGIBILITY)
        assert contrast["seen"] > 300 and contrast["ratio"] > 4.5, contrast
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert paper == ("rgb(22, 24, 28)" if dark else "rgb(255, 255, 255)")
        lines = page.evaluate("[...document.querySelectorAll('polyline')].map(e => e.getBoundingClientRect().width)")
        assert len(lines) == 2 + 2 and min(lines) > width / 8


def graphs(scheme="w4a4"):
    program = tiny_program(scheme)
    return reference_graph(capture(tiny_model(), tokens()), program.scheme), program.graph_module


def test_the_first_loop_inherits_nothing_and_parts_bound_the_whole():
    first, *later = carry(*graphs(), tokens(5))
    assert first["inherited"] == 0 and first["local"] == first["total"] > 0
    for row in later:
        assert row["inherited"] > 0 and row["total"] <= row["local"] + row["inherited"] + 1e-6
        assert -1 <= row["cosine"] < 1


def test_a_model_compared_with_itself_has_no_error():
    reference, _ = graphs()
    for row in carry(reference, reference, tokens(5)):
        assert row["total"] == row["local"] == row["inherited"] == 0 and row["cosine"] == pytest.approx(1)


def test_drift_equals_the_covariances_written_out():
    reference, _ = graphs()
    found = drift(reference, tokens(5))
    group = next(name for name in found if "down" in name)
    nodes = [n for n in reference.graph.nodes if n.meta.get("loopq_site") == "layers.0.down" and "linear" in n.name]
    values = {}

    class Record(torch.fx.Interpreter):
        def run_node(self, n):
            values[n.name] = super().run_node(n)
            return values[n.name]

    Record(reference, garbage_collect_values=False).run(*get_state(reference).signature.bind((tokens(5),), {}))
    xs = [values[n.args[0].name].detach().double().flatten(0, -2) for n in nodes]
    moments = [x.T @ x / (x.T @ x).trace() for x in xs]
    expected = [float((m - moments[0]).norm() / moments[0].norm()) for m in moments]
    assert found[group]["covariance"] == pytest.approx(expected, abs=1e-3)
    for peak, x in zip(found[group]["peak"], xs, strict=True):
        assert float((x.abs() > peak * (1 + 1e-6)).double().mean()) == pytest.approx(0.001, abs=1 / x.numel())
    assert sum(found[group]["scale"]) == pytest.approx(3)


def test_without_a_model_the_page_shows_what_the_program_knows():
    found = measure(tiny_program("w4a4", "las", "static"))
    assert "points" not in found and len(found["ranges"]) == 4
    first, *_, last = found["ranges"]
    assert first.endswith("v_proj") and last.endswith("down"), "program order"
    page = Page(render({"p": found}))
    assert page.count("table", "heatmap") == 1 and page.count("polyline") == 0


def test_shades_and_lines_take_gaps_and_numbers_that_are_not_finite():
    (row,) = cells({"a": [1.0, None, float("nan"), 0.5]})["rows"]
    assert [cell["shade"] for cell in row["cells"]] == [85, 0, 0, 42]
    drawn = plot({"a": [1.0, None, 10.0], "b": [0.0, 100.0, float("inf")]}, marks=[1])
    assert [len(line["points"].split()) for line in drawn["lines"]] == [2, 1]
    assert [tick["text"] for tick in drawn["ticks"]] == ["1", "3", "10", "30", "100"] and len(drawn["marks"]) == 1
    assert plot({})["lines"] == []


@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize(
    "values", [[0.0314, 0.238], [3.0, 3.0], [1000.0, 1001.0], [1e-9, 5.0], [0.41, 0.43, 0.40], [0.905284, 1.04761]]
)
def test_axes_have_a_few_ticks_inside_the_frame_and_in_order(values, log):
    drawn = plot({"a": values}, log=log)
    ticks = [(tick["y"], float(tick["text"])) for tick in drawn["ticks"]]
    assert 2 <= len(ticks) <= 6 and ticks == sorted(ticks, key=lambda tick: -tick[0])
    assert all(4 <= y <= drawn["bottom"] for y, _ in ticks)
    assert all(len(tick["text"]) <= 7 for tick in drawn["ticks"]), "labels fit before the frame"
    xs = [float(point.split(",")[0]) for point in drawn["lines"][0]["points"].split()]
    assert xs == sorted(xs) and drawn["left"] <= xs[0] <= xs[-1] <= drawn["width"]


def test_names_lose_the_modules_they_share():
    assert short_names(["m.layers.0.q", "m.layers.0.up", "m.layers.1.q"]) == ["0.q", "0.up", "1.q"]
    assert short_names(["m.q"]) == ["q"] and short_names([]) == []


def test_the_command_reports_on_saved_programs(tmp_path):
    tiny_program().save(tmp_path / "p")
    out = tmp_path / "new" / "r.html"
    done = CliRunner().invoke(app, ["report", str(tmp_path / "p"), "--out", str(out), "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["out"] == str(out)
    assert Page(out.read_text()).count("table", "heatmap") == 1
    done = CliRunner().invoke(app, ["report", str(tmp_path / "p"), str(tmp_path / "p")])
    assert done.exit_code == 1 and "different names" in done.stderr
    done = CliRunner().invoke(app, ["report", str(tmp_path / "p"), "--svg", str(tmp_path / "t.svg")])
    assert done.exit_code == 1 and "give --model" in done.stderr and not (tmp_path / "t.svg").exists()


def test_the_trajectory_alone_is_a_picture(full, tmp_path):
    file = write_page(tmp_path / "t.svg", trajectory_svg(full))
    root = ET.fromstring(file.read_text())
    lines = root.iter("{http://www.w3.org/2000/svg}polyline")
    shown = sum(point["error"] > 0 for point in full["other"]["points"])  # zero has no logarithm
    assert [len(line.get("points").split()) for line in lines] == [shown] * 2 and shown > 6
    with browser(tmp_path / "profile") as page:
        page.window(720, dark=True)
        page.open(file)
        assert page.evaluate("getComputedStyle(document.querySelector('.sheet')).fill") == "rgb(22, 24, 28)"
        boxes = page.evaluate(
            "[...document.querySelectorAll('text')].map(e => e.getBoundingClientRect()).map(b => [b.left, b.right])"
        )
        assert len(boxes) >= 8 and all(0 <= left < right <= 720 for left, right in boxes), "no text is cut off"
    with pytest.raises(lq.LoopQError, match="give --model"):
        trajectory_svg({"p": measure(tiny_program())})


def test_a_file_that_cannot_be_written_is_refused():
    with pytest.raises(lq.LoopQError, match="Cannot write to /proc"):
        tiny_program().report("/proc/no/report.html")
