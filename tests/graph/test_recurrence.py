"""Finds loops in graphs written as words: each letter is a linear layer, `3(ab2(c))` is a loop with a loop in it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from loopq_compile.graph.loops import LoopTag, get_tag
from loopq_compile.graph.recurrence import common_blocks, find_repeats, group_repeats, matrix_weight, weight_roots
from loopq_compile.graph.signature import Signature
from loopq_compile.graph.state import CompilerState, attach_state, get_state
from loopq_compile.graph.verify import verify_tags
from loopq_compile.passes.loops.tag_loops import TagLoops

aten = torch.ops.aten


@dataclass
class Writer:
    """Writes a word as a graph: `relu, linear, tanh` for each letter, a capital letter reads the input as well."""

    graph: fx.Graph = field(default_factory=fx.Graph)
    weights: dict[str, fx.Node] = field(default_factory=dict)
    meant: dict[fx.Node, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.x = self.input = self.graph.placeholder("x")

    def add(self, target, letter: str, label: str, *others: fx.Node) -> None:
        self.x = self.graph.call_function(target, (self.x, *others))
        self.x.meta["stack_trace"] = letter
        self.meant[self.x] = label

    def letter(self, letter: str, label: str) -> None:
        if letter.isupper():
            self.add(aten.add.Tensor, letter, label, self.input)
        self.add(aten.relu.default, letter, label)
        self.add(aten.linear.default, letter, label, self.weights[letter])
        self.add(aten.tanh.default, letter, label)

    def word(self, word: str, label: str = "") -> None:
        for item in split(word):
            if item.isalpha():
                self.letter(item, label)
            else:
                count, body = parse_loop(item)
                for k in range(count):
                    self.word(body, f"{label}.{k}".lstrip(".") if count > 1 else label)


def split(word: str) -> list[str]:
    """`"a2(b3(c))d"` as `["a", "2(b3(c))", "d"]`."""
    items, depth = [], 0
    for token in re.findall(r"\d+\(|\)|[a-zA-Z]", word):
        if depth:
            items[-1] += token
        else:
            items.append(token)
        depth += token.endswith("(") - (token == ")")
    return items


def parse_loop(item: str) -> tuple[int, str]:
    count, _, body = item.partition("(")
    return int(count), body[:-1]


def tagged(word: str) -> tuple[fx.GraphModule, Writer]:
    writer = Writer()
    letters = sorted({letter for letter in word if letter.isalpha()})
    with writer.graph.inserting_before(writer.input):
        writer.weights = {letter: writer.graph.get_attr(letter) for letter in letters}
    writer.word(word)
    writer.graph.output((writer.x,))
    parameters = {letter: nn.Parameter(torch.eye(2)) for letter in letters}
    graph_module = fx.GraphModule(parameters, writer.graph)
    attach_state(graph_module, CompilerState(Signature(("x",), (), {}, None), "Word"))
    # `GraphModule` copies the graph; nodes keep their names.
    names = {node.name: node for node in graph_module.graph.nodes}
    writer.meant = {names[node.name]: label for node, label in writer.meant.items()}
    TagLoops()(graph_module)
    return graph_module, writer


def label_of(node: fx.Node) -> str:
    tag = get_tag(node)
    return tag.label if tag else ""


def check(word: str, structure: str) -> None:
    graph_module, writer = tagged(word)
    assert get_state(graph_module).loops.describe() == structure
    wrong = {node.name: (label_of(node), label) for node, label in writer.meant.items() if label_of(node) != label}
    assert not wrong
    verify_tags(graph_module)


WORDS = {
    "a": "no loop",
    "abc": "no loop",
    "1(a)": "no loop",
    "2(a)": "2 x (a)",
    "7(a)": "7 x (a)",
    "3(ab)": "3 x (a, b)",
    "p3(ab)c": "3 x (a, b)",
    "p3(Ab)c": "3 x (A, b)",
    "p3(aB)c": "3 x (a, B)",
    "3(a2(b))": "3 x (a, 2 x (b))",
    "3(2(b)a)": "3 x (a, 2 x (b))",
    "3(a2(b)c)": "3 x (a, c, 2 x (b))",
    "p2(A2(Bc)d)e": "2 x (A, d, 2 x (B, c))",
    "2(2(a)3(b))": "2 x (2 x (a), 3 x (b))",
    "2(2(a)2(b))": "2 x (2 x (a), 2 x (b))",
    "4(2(a)4(b))": "4 x (2 x (a), 4 x (b))",
    "2(a3(b)c2(d))": "2 x (a, c, 3 x (b), 2 x (d))",
    "2(a2(b2(c)))": "2 x (a, 2 x (b, 2 x (c)))",
    "3(ab)2(c)": "3 x (a, b) + 2 x (c)",
    "2(c)p3(ab)": "3 x (a, b) + 2 x (c)",
    "2(a)2(b)2(c)": "2 x (a) + 2 x (b) + 2 x (c)",
}


@pytest.mark.parametrize("word", WORDS)
def test_words_have_the_structure_they_are_written_with(word):
    check(word, WORDS[word])


@pytest.mark.parametrize(
    ("word", "structure"),
    [
        ("2(3(a))", "6 x (a)"),  # without a module around, two loops are one
        ("abab", "2 x (a, b)"),
        ("aba", "2 x (a)"),
        ("abaca", "3 x (a)"),
        ("aabaab", "2 x (b, 2 x (a))"),
        ("abaab", "3 x (a, b)"),  # no period: the weight with most work counts, the other is between
        ("ababa", "3 x (a, b)"),
    ],
)
def test_what_words_without_brackets_are_read_as(word, structure):
    assert get_state(tagged(word)[0]).loops.describe() == structure


def test_layers_of_their_own_between_two_calls_stay_outside():
    graph_module, _ = tagged("xaYaZa")
    labels = {}
    for node in graph_module.graph.nodes:
        if node.target is aten.linear.default:
            labels.setdefault(str(node.args[1].target), []).append(str(get_tag(node) or ""))
    assert labels == {"x": [""], "a": ["loop=0", "loop=1", "loop=2"], "Y": [""], "Z": [""]}


@st.composite
def words(draw, letters: list[str], depth: int = 2) -> str:
    """Random nestings in which every loop has its own letter, so that the structure is unique."""
    own = letters.pop()
    body = own.upper() if draw(st.booleans()) else own
    for _ in range(draw(st.integers(0, 2))):
        if depth and draw(st.booleans()) and letters:
            item = f"{draw(st.integers(2, 4))}({draw(words(letters, depth - 1))})"
        else:
            item = letters.pop() if letters else ""
        body = body + item if draw(st.booleans()) else item + body
    return body


def describe(count: int, body: str) -> str:
    own = [item for item in split(body) if item.isalpha()]
    nested = [describe(*parse_loop(item)) for item in split(body) if not item.isalpha()]
    return f"{count} x ({', '.join([*own, *nested])})"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_random_nestings_are_found(data):
    letters = list("zyxwvutsrqponmlkj")
    count, body = data.draw(st.integers(2, 4)), data.draw(words(letters))
    prelude = data.draw(st.sampled_from(["", "a", "aB"]))
    coda = data.draw(st.sampled_from(["", "c", "cd"]))
    loops = [describe(count, body)]
    try:
        check(f"{prelude}{count}({body}){coda}", loops[0])
    except AssertionError as error:
        raise AssertionError(f"{prelude}{count}({body}){coda}") from error


def test_uses_side_by_side_are_no_loop():
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.get_attr("w")
    left = graph.call_function(aten.linear.default, (x, w))
    right = graph.call_function(aten.linear.default, (x, w))
    graph.output((left, right))
    assert find_repeats(graph) == []


def test_a_weight_is_known_behind_transposes_and_casts():
    graph = fx.Graph()
    w, x = graph.get_attr("w"), graph.placeholder("x")
    flipped = graph.call_function(aten.t.default, (w,))
    product = graph.call_function(aten.mm.default, (x, flipped))
    other = graph.call_function(aten.mm.default, (x, product))
    roots = weight_roots(graph)
    assert roots[flipped] == {"w"}
    assert matrix_weight(product, roots) == "w"
    assert matrix_weight(other, roots) is None


def test_a_norm_alone_is_no_loop():
    graph = fx.Graph()
    g, x = graph.get_attr("g"), graph.placeholder("x")
    for _ in range(3):
        x = graph.call_function(aten.rms_norm.default, (x, [4], g))
    graph.output(x)
    assert group_repeats(find_repeats(graph)) == []


def test_a_weight_whose_uses_lie_across_each_other_is_left_out():
    """A weight that also reads positions in every loop: such uses do not depend on each other."""
    graph = fx.Graph()
    shared, own, x, positions = graph.get_attr("a"), graph.get_attr("b"), *map(graph.placeholder, ("x", "positions"))
    for _ in range(4):
        place = graph.call_function(aten.linear.default, (positions, shared))
        x = graph.call_function(aten.add.Tensor, (graph.call_function(aten.linear.default, (x, shared)), place))
        x = graph.call_function(aten.linear.default, (x, own))
    graph.output(x)
    (group,) = group_repeats(find_repeats(graph))
    assert group.count == 4 and group.weights == ["b"]


@pytest.mark.parametrize(
    ("weights", "others", "blocks"),
    [
        (["layers.0.up", "layers.1.up"], ["head"], ("layers",)),
        (["layers.0.up", "layers.1.up"], ["layers.2.up"], ("layers.0", "layers.1")),
        (["m.layers.0.up", "m.norm"], ["m.head"], ("m.layers", "m.norm")),
        (["w"], [], ("w",)),
        ([], ["w"], ()),
    ],
)
def test_blocks_are_the_largest_names_that_cover_nothing_else(weights, others, blocks):
    assert common_blocks(weights, others) == blocks


def test_labels_name_iterations_outermost_first():
    assert str(LoopTag((0,), (2,))) == "loop=2"
    assert str(LoopTag((0, 1), (2, 0))) == "loop=2.0 of=0.1"
