"""Pattern rewriting: a pass made of two small functions. It reports for every candidate why it did not match.

    class FuseSwish(RewritePass):
        \"\"\"Before: `x * sigmoid(x)`. After: `silu(x)`.\"\"\"

        @staticmethod
        def pattern(x):
            return aten.mul.Tensor(x, aten.sigmoid.default(x))

        @staticmethod
        def replacement(x):
            return aten.silu.default(x)

Both functions are traced once. Parameters match anything, tensors and numbers alike. A parameter used twice must match
the same value twice. Everything else in the pattern must be equal. `RewritePass.find` returns matches and misses
without changing the graph.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from loopq_compile.errors import LoopQError
from loopq_compile.graph.insert import inserting
from loopq_compile.graph.keys import SITE
from loopq_compile.graph.loops import LoopTag, get_tag
from loopq_compile.passes.base import Pass, PassResult


@dataclass
class Match:
    """A place where a pattern fits.

    Args:
        anchor: the node whose value the pattern returns.
        values: what its parameters matched, by name: nodes, numbers, lists.
        nodes: the matched nodes, the anchor included.
        tag: the loop of all of them, None outside loops.
    """

    anchor: fx.Node
    values: dict[str, Any] = field(default_factory=dict)
    nodes: dict[fx.Node, fx.Node] = field(default_factory=dict)
    tag: LoopTag | None = None


@dataclass(frozen=True)
class Miss:
    """A node that could have ended a match but did not.

    Args:
        anchor: a node with the operator of the pattern's last node.
        node: the node at which pattern and graph differ.
        reason: the difference in words.
    """

    anchor: str
    node: str
    reason: str

    def __str__(self) -> str:
        return f"at {self.anchor}: {self.node}: {self.reason}"


class RewritePass(Pass):
    """Replaces every match of `pattern` by `replacement`.

    Before: matches of `pattern`, each inside one loop iteration, their inner values read by nothing else. After: the
    nodes of `replacement`, with the loop tag, the site and the name of what they replace.

    Does not touch matches for which `check` gives a reason, nor those that would cross from one loop into the next.
    The log counts matches and lists the reasons.
    """

    pattern: Callable[..., Any]
    """Static method; parameters are wildcards, the result is one call of an operator (`torch.ops...default`)."""
    replacement: Callable[..., Any]
    """Static method with the same parameters."""

    def check(self, match: Match) -> str:
        """Why not to rewrite this match; "" to rewrite it. For conditions that a pattern cannot express."""
        return ""

    def find(self, graph_module: fx.GraphModule) -> tuple[list[Match], list[Miss]]:
        """Matches and misses, in graph order; nothing is changed.

        Raises:
            LoopQError: `pattern` or `replacement` cannot be traced, or their parameters differ.
        """
        pattern = _trace(self, "pattern")
        if [n.name for n in pattern.find_nodes(op="placeholder")] != [
            n.name for n in _trace(self, "replacement").find_nodes(op="placeholder")
        ]:
            raise LoopQError(f"{self.name}: pattern and replacement must have the same parameters.")
        matches: list[Match] = []
        misses: list[Miss] = []
        taken: set[fx.Node] = set()
        end = _result(self, pattern)
        for node in graph_module.graph.find_nodes(op="call_function", target=end.target):
            match = Match(node, tag=get_tag(node))
            try:
                _unify(end, node, match)
                _check_inside(match, taken)
                if reason := self.check(match):
                    raise _Apart(node, reason)
            except _Apart as apart:
                misses.append(Miss(node.name, apart.node.name, apart.reason))
                continue
            taken.update(match.nodes.values())
            matches.append(match)
        return matches, misses

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        matches, misses = self.find(graph_module)
        replacement = _trace(self, "replacement")
        for match in matches:
            _replace(graph_module.graph, match, replacement)
        state = self.state(graph_module)
        state.note(f"{len(matches)} matches, {len(misses)} misses")
        for miss in misses[:10]:
            state.note(str(miss))
        return PassResult(graph_module, bool(matches))


class _Apart(Exception):
    """Pattern and graph differ at `node`."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(reason)
        self.node, self.reason = node, reason


def _trace(item: RewritePass, name: str) -> fx.Graph:
    function = inspect.getattr_static(type(item), name, None)
    if not isinstance(function, staticmethod):
        raise LoopQError(f"{item.name}: {name} must be a @staticmethod whose parameters are the wildcards.")
    try:
        return fx.Tracer().trace(function.__func__)
    except Exception as error:  # the user's own function
        raise LoopQError(f"{item.name}: {name} cannot be traced: {error}") from error


def _result(item: RewritePass, pattern: fx.Graph) -> fx.Node:
    (result,) = pattern.find_nodes(op="output")[0].args
    if not isinstance(result, fx.Node) or result.op != "call_function":
        raise LoopQError(f"{item.name}: pattern must return the value of one operator.")
    return result


def _unify(wanted: Any, found: Any, match: Match, at: fx.Node | None = None) -> None:
    """Compares a value of the pattern with one of the graph, which node `at` reads.

    Raises:
        _Apart: they differ.
    """
    at = at if at is not None else match.anchor
    if isinstance(wanted, fx.Node) and wanted.op == "placeholder":
        if wanted.name in match.values and match.values[wanted.name] is not found:
            before = match.values[wanted.name]
            raise _Apart(at, f"{wanted.name} is {found} here and {before} elsewhere in the match")
        match.values[wanted.name] = found
    elif isinstance(wanted, fx.Node):
        _unify_call(wanted, found, match, at)
    elif isinstance(wanted, list | tuple) and isinstance(found, list | tuple):
        if len(wanted) != len(found):
            raise _Apart(at, f"an argument has {len(found)} entries, the pattern has {len(wanted)}")
        for inner, other in zip(wanted, found, strict=True):
            _unify(inner, other, match, at)
    elif wanted != found:
        raise _Apart(at, f"an argument is {found}, the pattern has {wanted}")


def _unify_call(wanted: fx.Node, found: Any, match: Match, at: fx.Node) -> None:
    if not isinstance(found, fx.Node):
        raise _Apart(at, f"an argument is {found}, the pattern has the result of {wanted.target}")
    if found.op != "call_function" or found.target != wanted.target:
        what = found.target if found.op == "call_function" else found.op
        raise _Apart(found, f"is {what}, the pattern has {wanted.target}")
    if match.nodes.setdefault(wanted, found) is not found:
        raise _Apart(found, f"the pattern reads one result of {wanted.target} twice, here are two")
    if get_tag(found) != match.tag:
        raise _Apart(
            found,
            f"stands in {get_tag(found) or 'no loop'}, {match.anchor.name} in {match.tag or 'no loop'}; a rewrite must "
            "not cross from one loop into the next",
        )
    theirs, ours = _arguments(found), _arguments(wanted)
    for name in {**ours, **theirs}:  # in a fixed order, so that reasons are the same in every run
        _unify(ours.get(name), theirs.get(name), match, found)


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments by name with defaults filled in, so that it does not matter how a call was written."""
    schema = node.target._schema.arguments if isinstance(node.target, torch._ops.OpOverload) else []
    named = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    names = [argument.name for argument in schema] or [str(i) for i in range(len(node.args))]
    return named | dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _check_inside(match: Match, taken: set[fx.Node]) -> None:
    """Checks that inner values of the match are read by nothing else, and belong to no other match."""
    inside = set(match.nodes.values())
    for node in inside:
        if node in taken:
            raise _Apart(node, "belongs to another match")
        outside = [user.name for user in node.users if user not in inside]
        if node is not match.anchor and outside:
            raise _Apart(node, f"its value is also read by {', '.join(outside[:3])}")


def _replace(graph: fx.Graph, match: Match, replacement: fx.Graph) -> None:
    anchor = match.anchor
    values: dict[fx.Node, Any] = {n: match.values[n.name] for n in replacement.find_nodes(op="placeholder")}
    with inserting(graph, before=anchor, tag=match.tag, site=anchor.meta.get(SITE, "")):
        new = graph.graph_copy(replacement, values)
    if not isinstance(new, fx.Node):
        raise LoopQError(f"The replacement at {anchor.name!r} must return the value of one operator or a parameter.")
    for node in graph.nodes:
        if node in values.values():
            node.meta.setdefault("nn_module_stack", anchor.meta.get("nn_module_stack"))
    anchor.replace_all_uses_with(new)
    for node in sorted(match.nodes.values(), reverse=True):
        if not node.users:
            graph.erase_node(node)
    if new.op == "call_function" and new in values.values() and new not in match.values.values():
        new.name = anchor.name  # loop boundaries refer to nodes by name
        new.meta.setdefault("val", anchor.meta.get("val"))
