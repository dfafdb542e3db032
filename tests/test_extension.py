"""Extending the compiler: names of other packages, what remains when a pass fails, debug folders, bisecting."""

import json
import math

import pytest
import torch
from torch import fx
from typer.testing import CliRunner

import loopq_compile as lq
from loopq_compile import backends, methods
from loopq_compile.analysis.bisect import bisect, relative_error
from loopq_compile.backends import get_backend, register_backend
from loopq_compile.capture.to_graph import capture
from loopq_compile.cli import app
from loopq_compile.errors import InternalError
from loopq_compile.operators import ops
from loopq_compile.passes import Pass, PassResult, catalog
from loopq_compile.passes.catalog import get_pass, pass_names, register_pass
from loopq_compile.storage.artifact import verify
from tests.cli_models import tiny_llama
from tests.tiny import tiny_model, tokens

PLUGIN = '''
import loopq_compile as lq
from loopq_compile.passes import Pass, PassResult

class Visit(Pass):
    """Before and after: the same graph."""
    def call(self, graph_module):
        self.state(graph_module).note("hello from afar")
        return PassResult(graph_module, False)

def visiting():
    return lq.pipelines.symmetric().insert_after("tag-loops", Visit())

def lower(program, **options):
    return program

no_pipeline = lambda: 3
'''
ENTRY_POINTS = """
[loopq_compile.passes]
visit = afar:Visit
no-pass = afar:visiting
[loopq_compile.methods]
visiting = afar:visiting
broken = afar:not_there
odd = afar:no_pipeline
[loopq_compile.backends]
afar = afar
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Another package, as pip would have installed it."""
    (tmp_path / "afar.py").write_text(PLUGIN)
    folder = tmp_path / "afar-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: afar\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(str(tmp_path))


class Break(Pass):
    """Replaces a SiLU by a minus: valid, but wrong."""

    def __init__(self, loop="1"):
        super().__init__()
        self.loop = loop

    def call(self, graph_module):
        silu = [n for n in graph_module.graph.nodes if n.target is torch.ops.aten.silu.default]
        node = next(n for n in silu if n.meta["loopq_loop"].label == self.loop)
        node.target = torch.ops.aten.neg.default
        return PassResult(graph_module, True)


class Fail(Pass):
    """Spoils the graph, then breaks."""

    def call(self, graph_module):
        for node in [n for n in graph_module.graph.nodes if n.op == "call_function"]:
            node.args = ()
        raise ZeroDivisionError("one by zero")


class Refuse(Pass):
    """Finds that the input cannot be handled."""

    def call(self, graph_module):
        raise lq.LoopQError("no such luck")


def compiled(pipeline, **options):
    return lq.compile(tiny_model(), tokens(), scheme="w4a8", method=pipeline, **options)


def test_other_packages_bring_passes_methods_and_backends(installed):
    assert "visit" in pass_names() and get_pass("visit").name == "visit"
    program = compiled("visiting")
    assert ["hello from afar"] in [entry.notes for entry in program.log]
    assert program.lower("afar") is program.graph_module
    done = CliRunner().invoke(app, ["bisect", "bundled", "--method", "nothing"])
    assert done.exit_code == 1 and "visiting" in done.stderr


def test_what_other_packages_bring_is_checked(installed):
    with pytest.raises(lq.LoopQError, match="'broken' of afar cannot be imported"):
        compiled("broken")
    with pytest.raises(lq.LoopQError, match="must return a Pipeline; got int"):
        compiled("odd")
    with pytest.raises(lq.LoopQError, match="is not a subclass of"):
        get_pass("no-pass")


def test_all_built_in_passes_have_names():
    assert {item.name for item in methods.loopq()} <= set(pass_names())
    assert "rewrite-pass" not in pass_names() and get_pass("insert-las").name == "insert-las"
    with pytest.raises(lq.LoopQError, match="Did you mean 'tag-loops'"):
        get_pass("tag-loop")
    with pytest.raises(lq.LoopQError, match="cannot be made with"):
        get_pass("insert-las", colour="red")


def test_names_registered_here_are_not_overwritten(monkeypatch):
    monkeypatch.setattr(backends, "_registered", {})
    monkeypatch.setattr(methods, "METHODS", dict(methods.METHODS))
    monkeypatch.setattr(catalog, "_known", dict(catalog._known))
    register_pass(Break)
    assert isinstance(get_pass("break", loop="0"), Break)
    methods.register_method("mine", methods.symmetric)
    assert compiled("mine").loops.count == 3
    register_backend("mine", get_backend("reference"))
    for again in (
        lambda: register_pass(Break),
        lambda: methods.register_method("loopq", methods.symmetric),
        lambda: register_backend("onnx", get_backend("reference")),
    ):
        with pytest.raises(lq.LoopQError, match="already; choose another name"):
            again()
    with pytest.raises(lq.LoopQError, match="no function lower"):
        register_backend("other", object())
    with pytest.raises(lq.LoopQError, match="must be a function"):
        methods.register_method("other", methods.symmetric())


def test_a_pipeline_prints_its_passes_and_counts_those_of_one_name():
    text = str(methods.loopq()).splitlines()
    assert text[0] == "Pipeline 'loopq', 21 passes" and text[1].startswith("  0  tag-loops ")
    names = [item.name for item in methods.loopq().insert_before("calibrate", Break(), occurrence=-1)]
    assert names.index("break") == max(i for i, name in enumerate(names) if name == "calibrate") - 1
    with pytest.raises(lq.LoopQError, match="has 'calibrate' 4 times; occurrence is 4"):
        methods.loopq().remove("calibrate", occurrence=4)


@pytest.mark.parametrize(("item", "kind"), [(Fail(), InternalError), (Refuse(), lq.LoopQError)])
def test_what_was_valid_before_a_failure_runs_prints_and_saves(item, kind, tmp_path):
    model = tiny_model()
    with pytest.raises(kind) as caught:
        compiled(lq.pipelines.symmetric().insert_after("canonicalize-linears", item))
    failure = caught.value.failure
    assert failure.pass_name == item.name and failure.passes_before == ["tag-loops", "canonicalize-linears"]
    program = failure.program
    torch.testing.assert_close(program(tokens(3))["logits"], model(tokens(3))["logits"], rtol=1e-5, atol=1e-5)
    assert "loop=2" in str(program) and [entry.pass_name for entry in program.log] == failure.passes_before
    program.save(tmp_path / "p")
    assert "3 x (layers, norm, exit_gate)" in verify(tmp_path / "p").description


def test_the_debug_folder_has_the_program_after_each_pass(tmp_path, monkeypatch):
    expected = str(compiled("symmetric"))
    monkeypatch.setenv("LOOPQ_COMPILE_DEBUG", str(tmp_path))
    assert str(compiled("symmetric")) == expected, "watching changes nothing"
    names = [item.name for item in lq.pipelines.symmetric()]
    written = sorted(path.name for path in (tmp_path / "symmetric").iterdir())
    assert written == [f"{i:02d}-{name}.py" for i, name in enumerate(["captured", *names])]
    assert (tmp_path / "symmetric" / written[-1]).read_text() == expected
    assert "# loop=1" in (tmp_path / "symmetric" / "01-tag-loops.py").read_text()


def test_the_debug_folder_keeps_the_traceback_and_the_last_valid_program(tmp_path, monkeypatch):
    monkeypatch.setenv("LOOPQ_COMPILE_DEBUG", str(tmp_path))
    for _ in range(2):
        with pytest.raises(InternalError):
            compiled(lq.pipelines.symmetric().insert_after("tag-loops", Fail()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["symmetric", "symmetric-2"]
    assert "ZeroDivisionError: one by zero" in (tmp_path / "symmetric" / "failure.txt").read_text()
    assert lq.load(tmp_path / "symmetric-2" / "last-valid").loops.count == 3


def test_bisect_finds_the_pass_and_the_node():
    pipeline = lq.pipelines.symmetric().insert_after("canonicalize-linears", Break("1"))
    captured = capture(tiny_model(), tokens())
    before = len(captured.graph.nodes)
    found = bisect(captured, lq.Scheme.parse("w8a8"), pipeline, [tokens(1, 1, 8)], limit=0.05)
    assert [step.pass_name for step in found.steps] == [item.name for item in pipeline]
    assert found.culprit.pass_name == "break" and found.culprit.number == 2
    assert found.culprit.first.loop == "loop=1" and "silu" in found.culprit.first.node
    assert found.steps[1].error < 1e-5 and found.steps[0].first is None
    assert len(captured.graph.nodes) == before


def test_bisect_without_a_limit_names_what_added_most():
    captured = capture(tiny_model(), tokens())
    found = bisect(captured, lq.Scheme.parse("w2a8"), lq.pipelines.symmetric(), [tokens(1, 1, 8)])
    assert found.culprit.pass_name == "quantize-weights"
    assert found.culprit.change == max(step.change for step in found.steps)


def test_bisect_counts_nan_as_infinite():
    class Nan(Pass):
        """Spoils a scale."""

        def call(self, graph_module: fx.GraphModule) -> PassResult:
            node = [n for n in graph_module.graph.nodes if n.target is ops.dequantize.default][-1]
            with graph_module.graph.inserting_after(node):
                bad = graph_module.graph.call_function(torch.ops.aten.mul.Scalar, (node, math.nan))
            node.replace_all_uses_with(bad, delete_user_cb=lambda user: user is not bad)
            return PassResult(graph_module, True)

    pipeline = lq.pipelines.symmetric().insert_after("pack-weights", Nan())
    found = bisect(capture(tiny_model(), tokens()), lq.Scheme.parse("w8a16"), pipeline, [tokens(1, 1, 8)])
    assert found.culprit.pass_name == "nan" and math.isinf(found.culprit.error)
    assert relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 9.0])) == 1.0


def test_the_bisect_command_ends_with_3_over_the_limit(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    arguments = ["bisect", f"{tmp_path}@0-1x2", "--scheme", "w8a16", "--length", "8", "--json", "--limit"]
    done = CliRunner().invoke(app, [*arguments, "1e-9"])
    assert done.exit_code == 3 and json.loads(done.stdout)["culprit"]["pass_name"] == "quantize-weights"
    done = CliRunner().invoke(app, [*arguments, "0.9"])
    assert done.exit_code == 0 and json.loads(done.stdout)["culprit"] is None
