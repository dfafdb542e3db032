"""Pattern rewriting: what matches, what does not and why, and that loops do not change."""

import re

import pytest
import torch
from torch import nn

import loopq_compile as lq
from loopq_compile.capture.to_graph import capture
from loopq_compile.graph.loops import get_tag
from loopq_compile.graph.state import get_state
from loopq_compile.graph.verify import verify_tags
from loopq_compile.passes.loops.tag_loops import TagLoops
from loopq_compile.passes.rewrite import RewritePass
from loopq_compile.pipeline import Pipeline
from loopq_compile.program import Program

aten = torch.ops.aten
IDS = torch.arange(6).view(2, 3)


class FuseSwish(RewritePass):
    """Before: `x * sigmoid(x)`. After: `silu(x)`."""

    @staticmethod
    def pattern(x):
        return aten.mul.Tensor(x, aten.sigmoid.default(x))

    @staticmethod
    def replacement(x):
        return aten.silu.default(x)


class Swish(nn.Module):
    """A loop with a swish written out; `variant` spoils it in one way."""

    def __init__(self, variant=""):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layer, self.head = nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 16)
        self.variant = variant

    def forward(self, input_ids):
        x, kept = self.embed(input_ids), 0
        for _ in range(3):
            y = self.layer(x)
            s = torch.sigmoid(y)
            kept = kept + (s if self.variant == "read elsewhere" else 0)
            if self.variant == "another operator":
                s = torch.tanh(y)
            x = (x if self.variant == "two values" else y) * s
        return self.head(x + kept)


def tagged(variant=""):
    return Pipeline([TagLoops()]).run(capture(Swish(variant).eval(), IDS))


def targets(graph_module):
    return [str(n.target) for n in graph_module.graph.nodes if n.op == "call_function"]


def test_every_loop_is_rewritten_and_nothing_else_changes():
    graph_module = tagged()
    expected = Program(graph_module)(IDS)
    boundaries = get_state(graph_module).loops.boundaries
    graph_module = Pipeline([FuseSwish()]).run(graph_module)
    assert targets(graph_module).count("aten.silu.default") == 3 and "aten.sigmoid.default" not in targets(graph_module)
    torch.testing.assert_close(Program(graph_module)(IDS), expected, rtol=1e-6, atol=1e-6)
    names = {node.name: node for node in graph_module.graph.nodes}
    made = [n for n in graph_module.graph.nodes if n.target is aten.silu.default]
    assert [str(get_tag(n)) for n in made] == ["loop=0", "loop=1", "loop=2"]
    assert all(name in names for edge in boundaries for name in edge.state)
    assert get_state(graph_module).log[-1].notes == ["3 matches, 0 misses"]
    verify_tags(graph_module)


def test_a_second_run_changes_nothing():
    graph_module = Pipeline([FuseSwish()]).run(tagged())
    before = str(Program(graph_module))
    assert FuseSwish()(graph_module).modified is False
    assert str(Program(graph_module)) == before


@pytest.mark.parametrize(
    ("variant", "reason"),
    [
        ("read elsewhere", "its value is also read by add"),
        ("another operator", "is aten.tanh.default, the pattern has aten.sigmoid.default"),
        ("two values", "x is .* here and .* elsewhere in the match"),
    ],
)
def test_a_miss_says_where_and_why(variant, reason):
    graph_module = tagged(variant)
    before = targets(graph_module)
    matches, misses = FuseSwish().find(graph_module)
    assert matches == [] and len(misses) == 3
    for miss in misses:
        assert re.search(reason, str(miss)), str(miss)
    assert FuseSwish()(graph_module).modified is False and targets(graph_module) == before


def test_check_keeps_what_it_has_a_reason_for():
    class NotFirst(FuseSwish):
        """Does not rewrite loop 0."""

        def check(self, match):
            return "the first loop stays" if match.tag.index == (0,) else ""

    matches, misses = NotFirst().find(tagged())
    assert [match.tag.label for match in matches] == ["1", "2"]
    assert [miss.reason for miss in misses] == ["the first loop stays"]


def test_a_pattern_does_not_reach_into_the_next_loop():
    class Across(RewritePass):
        """The linear of a loop reads the product of the one before."""

        @staticmethod
        def pattern(x, s, weight, bias):
            return aten.linear.default(aten.mul.Tensor(x, s), weight, bias)

        @staticmethod
        def replacement(x, s, weight, bias):
            return aten.linear.default(x, weight, bias)

    _, misses = Across().find(tagged())
    assert any("must not cross from one loop into the next" in miss.reason for miss in misses)


def test_numbers_are_compared_and_defaults_do_not_matter():
    class AddTwice(RewritePass):
        """`x + 2 y`, which no model here has: alpha is 1."""

        @staticmethod
        def pattern(x, y):
            return aten.add.Tensor(x, y, alpha=2)

        @staticmethod
        def replacement(x, y):
            return aten.add.Tensor(x, y)

    _, misses = AddTwice().find(tagged("read elsewhere"))
    assert misses and all("an argument is 1, the pattern has 2" in miss.reason for miss in misses)


class Method(FuseSwish):
    """Its pattern is not a static method."""

    def pattern(self, x):
        return aten.silu.default(x)


class OtherParameters(FuseSwish):
    """Its replacement takes other parameters."""

    @staticmethod
    def replacement(y):
        return aten.silu.default(y)


class Branches(FuseSwish):
    """Its pattern depends on values."""

    @staticmethod
    def pattern(x):
        return aten.silu.default(x) if x > 0 else x


@pytest.mark.parametrize(
    ("item", "says"),
    [(Method, "must be a @staticmethod"), (OtherParameters, "the same parameters"), (Branches, "cannot be traced")],
)
def test_what_is_no_pattern_is_refused(item, says):
    with pytest.raises(lq.LoopQError, match=says):
        item().find(tagged())
