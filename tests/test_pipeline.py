"""Pipelines: editing, errors that name the pass, and checks after each pass."""

import pytest

import loopq_compile as lq
from loopq_compile.capture.to_graph import capture
from loopq_compile.errors import InternalError
from loopq_compile.graph.loops import get_tag, set_tag
from loopq_compile.graph.state import get_state
from loopq_compile.passes import Pass, PassResult
from tests.tiny import tiny_model, tokens


class CountNodes(Pass):
    """Before and after: the same graph."""

    def __init__(self):
        self.seen = None

    def call(self, graph_module):
        self.seen = len(graph_module.graph.nodes)
        return PassResult(graph_module, False)


class LoseTags(Pass):
    """Before: tags. After: a node inside a loop has lost its tag, which the verifier must notice."""

    def call(self, graph_module):
        node = next(n for n in graph_module.graph.nodes if get_tag(n) and n.target.__name__ == "silu.default")
        set_tag(node, None)
        return PassResult(graph_module, True)


class Fail(Pass):
    """Breaks."""

    def call(self, graph_module):
        raise ZeroDivisionError("one by zero")


def names(pipeline):
    return [item.name for item in pipeline]


def test_passes_have_kebab_case_names():
    assert CountNodes().name == "count-nodes"
    assert names(lq.pipelines.symmetric())[:2] == ["tag-loops", "canonicalize-linears"]


def test_insert_replace_remove_leave_the_original_alone():
    base = lq.pipelines.symmetric()
    before = names(base)
    assert names(base.insert_after("tag-loops", CountNodes()))[1] == "count-nodes"
    assert names(base.insert_before("tag-loops", CountNodes()))[0] == "count-nodes"
    assert "pack-weights" not in names(base.remove("pack-weights"))
    assert names(base.replace("pack-weights", CountNodes()))[-1] == "count-nodes"
    assert names(base) == before
    assert repr(base).startswith("Pipeline(symmetric: tag-loops -> ")


def test_a_custom_pass_sees_the_tagged_graph():
    item = CountNodes()
    lq.compile(tiny_model(), tokens(), scheme="w4a8", method=lq.pipelines.symmetric().insert_after("tag-loops", item))
    assert item.seen > 50


def test_las_is_symmetric_with_one_more_pass():
    assert [n for n in names(lq.pipelines.las()) if n != "insert-las"] == names(lq.pipelines.symmetric())


def test_a_pass_that_loses_a_tag_is_named_with_those_before_it():
    pipeline = lq.pipelines.symmetric().insert_after("annotate-linears", LoseTags())
    with pytest.raises(InternalError, match=r"'lose-tags' failed.*tag-loops.*annotate-linears.*silu"):
        lq.compile(tiny_model(), tokens(), method=pipeline, scheme="w4a8")


def test_a_failing_pass_is_named():
    with pytest.raises(InternalError, match=r"'fail' failed \(passes before it: tag-loops\): one by zero"):
        lq.compile(tiny_model(), tokens(), method=lq.pipelines.symmetric().insert_after("tag-loops", Fail()))


def test_what_is_no_pass_is_refused():
    with pytest.raises(lq.LoopQError, match="write CountNodes\\(\\)"):
        lq.Pipeline([CountNodes])
    with pytest.raises(lq.LoopQError, match="got str"):
        lq.Pipeline(["tag-loops"])
    with pytest.raises(lq.LoopQError, match="Did you mean 'tag-loops'"):
        lq.pipelines.symmetric().remove("tag-loop")


def test_the_log_says_what_happened():
    graph_module = capture(tiny_model(), tokens())
    get_state(graph_module).scheme = lq.Scheme.parse("w4a8")
    lq.pipelines.symmetric().run(graph_module)
    log = get_state(graph_module).log
    assert [entry.pass_name for entry in log] == names(lq.pipelines.symmetric())
    assert log[0].modified and log[0].notes == ["3 x (layers, norm, exit_gate)"]
