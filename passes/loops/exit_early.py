"""`exit-early`: a rolled loop stops when its exit gate reports every token as done."""

from __future__ import annotations

import operator
import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from loopq_compile.errors import LoopQError
from loopq_compile.graph.early_exit import EXIT_THRESHOLD, LOOPS_SPENT, has_early_exit
from loopq_compile.graph.insert import add_constant, call
from loopq_compile.graph.rolled import RolledLoop
from loopq_compile.graph.shapes import infer_shapes
from loopq_compile.graph.signature import InputSpec, named_results
from loopq_compile.graph.state import get_state, get_tensor
from loopq_compile.passes.base import Pass, PassResult
from loopq_compile.passes.cache.cache_regions import ATTENTION_MASK

_aten = torch.ops.aten
_TRANSPARENT = {_aten.sigmoid.default, _aten.squeeze.dim, _aten.squeeze.default, _aten.to.dtype, _aten.clone.default}
"""Operators that may lie between a gate and the result that the loop returns."""


class ExitEarly(Pass):
    """Lets the main loop of a rolled program stop early; runs after `roll-loops`.

    Before: `loop_0([state], [shared])` runs all iterations and returns, among other things, the logit of an exit gate,
    a linear with one output per token. After: the loop also carries every token's probability of having passed all
    gates so far. It stops after the first iteration in which, for all new tokens of the call, the probability of having
    stopped reaches `exit_threshold` (Ouro, arXiv 2510.25741: the cumulative exit probability `1 - prod(1 - sigmoid)`).
    From 1 on all iterations run, with bit-identical results. The program returns a dict, with `loops_spent`.

    The head reads the state after the last iteration that ran. For iterations that did not run, everything else
    that the loop returns is what the last one that ran returned. Keys and values of the new tokens that a cache
    would lack are therefore those of the last computed loop, as in Ouro's sharing of the last loop's cache. Padding
    does not delay a stop, if the program has an attention mask.

    Does nothing to a program that can already stop early.

    Raises:
        LoopQError: there is no rolled loop, it has no exit gate or several, or its first iteration is separate.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        state = self.state(graph_module)
        if has_early_exit(state.signature):
            return PassResult(graph_module, False)
        node, loop = _main_loop(graph_module)
        gate = _find_gate(graph_module, node, loop)
        infer_shapes(graph_module)
        carried = len(node.args[0])  # type: ignore[arg-type]
        graph_module.add_module(str(node.target), _extended(loop, carried, gate))
        spent = _extend_call(graph_module, node, carried)
        output = next(n for n in graph_module.graph.nodes if n.op == "output")
        values = list(output.args[0])
        names = named_results(state.signature.outputs, [value.meta.get("val") for value in values])
        output.args = ((*values, spent),)
        state.signature = replace(
            state.signature,
            parameters=(*state.signature.parameters, EXIT_THRESHOLD),
            inputs=(*state.signature.inputs, InputSpec(EXIT_THRESHOLD, torch.float32, ())),
            outputs=pytree.tree_structure(dict.fromkeys([*names, LOOPS_SPENT], 0)),
        )
        for other in graph_module.graph.nodes:
            other.meta.pop("val", None)
        state.note(f"loop {loop.number} stops when {gate.name} says so")
        return PassResult(graph_module, True)


def _main_loop(graph_module: fx.GraphModule) -> tuple[fx.Node, RolledLoop]:
    for node in graph_module.graph.nodes:
        loop = graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(loop, RolledLoop) and loop.number == 0:
            if loop.skipped:
                raise LoopQError(
                    "Early exit needs a loop whose iterations are all alike; here the first one is separate from it."
                )
            return node, loop
    raise LoopQError("Early exit needs a loop that is rolled: run roll-loops first, or export with form='rolled'.")


def _find_gate(graph_module: fx.GraphModule, node: fx.Node, loop: RolledLoop) -> fx.Node:
    """The linear of the loop's body with one output per token that every iteration returns.

    Raises:
        LoopQError: there is none, or more than one.
    """
    state, shared = node.args
    inputs = [n for n in loop.body.graph.nodes if n.op == "placeholder"]
    outer = dict(zip(inputs[1 + len(state) :], shared, strict=True))  # type: ignore[arg-type]
    found: dict[fx.Node, None] = {}
    for result in _results(loop)[len(state) :]:  # type: ignore[arg-type]
        value: Any = result
        while value.target in _TRANSPARENT:
            value = value.args[0]
        if value.target is _aten.linear.default:
            weight: Any = outer.get(value.args[1])
            is_stored = isinstance(weight, fx.Node) and weight.op == "get_attr"
            if is_stored and len(get_tensor(graph_module, str(weight.target))) == 1:
                found[value] = None
    if len(found) != 1:
        what = f"{len(found)} exit gates ({', '.join(gate.name for gate in found)})" if found else "no exit gate"
        raise LoopQError(
            f"This model has {what}: early exit needs one linear with a single output per token, whose result every "
            "loop returns (a gate whose result the model does not return is not part of the captured program)."
        )
    return next(iter(found))


def _results(loop: RolledLoop) -> list[Any]:
    return list(next(n for n in loop.body.graph.nodes if n.op == "output").args[0])


def _extended(loop: RolledLoop, carried: int, gate: fx.Node) -> RolledLoop:
    """The loop with two additional parts of its state: the probability of going on, and the number of iterations."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    results: Any = graph.graph_copy(loop.body.graph, copies)
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    with graph.inserting_after(inputs[carried]):
        survival = graph.placeholder("survival")
    with graph.inserting_after(survival):
        spent = graph.placeholder(LOOPS_SPENT)
    logit = call(graph, _aten.to.dtype, copies[gate], torch.float32)
    stays = call(graph, _aten.sigmoid.default, call(graph, _aten.neg.default, logit))
    state = [call(graph, _aten.mul.Tensor, survival, stays), call(graph, _aten.add.Tensor, spent, 1)]
    graph.output((*results[:carried], *state, *results[carried:]))
    body = fx.GraphModule({}, graph)
    return RolledLoop(body, loop.count, loop.rows, loop.skipped, loop.number, loop.scanned, survival=carried)


def _extend_call(graph_module: fx.GraphModule, node: fx.Node, carried: int) -> fx.Node:
    """Gives the loop its threshold and the two parts of the state; returns the number of iterations."""
    graph = graph_module.graph
    none = add_constant(graph_module, f"{node.target}_spent", torch.zeros((), dtype=torch.int64))
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    with graph.inserting_after(placeholders[-1]):
        threshold = graph.placeholder(EXIT_THRESHOLD)
    with graph.inserting_before(node):
        alive = _alive(graph_module, placeholders)
    state, shared = node.args
    node.args = ([*state, alive, none], shared, threshold)  # type: ignore[misc]
    for reader in list(node.users):
        if reader.target is operator.getitem and reader.args[1] >= carried:  # type: ignore[operator]
            reader.args = (node, reader.args[1] + 2)  # type: ignore[operator]
    with graph.inserting_after(node):
        return graph.call_function(operator.getitem, (node, carried + 1))


def _alive(graph_module: fx.GraphModule, placeholders: list[fx.Node]) -> fx.Node:
    """1 for every new token `[batch, new, 1]`, 0 for padding."""
    graph = graph_module.graph
    named = {s.name: n for s, n in zip(get_state(graph_module).signature.inputs, placeholders, strict=True)}
    mask = named.get(ATTENTION_MASK)
    tokens = next(node for name, node in named.items() if name != ATTENTION_MASK)
    value = tokens.meta["val"]
    if not isinstance(value, Tensor) or value.ndim < 2:
        raise LoopQError(f"Early exit needs tokens [batch, sequence] as first input; {tokens.name!r} has none.")
    if mask is None:
        rows = tokens if value.ndim == 2 else call(graph, _aten.select.int, tokens, 2, 0)
        ones = graph.call_function(_aten.ones_like.default, (rows,), {"dtype": torch.float32})
        return call(graph, _aten.unsqueeze.default, ones, -1)
    new, total = (call(graph, _aten.sym_size.int, node, 1) for node in (tokens, mask))
    first = graph.call_function(operator.sub, (total, new))
    last = call(graph, _aten.slice.Tensor, mask, 1, first, sys.maxsize)
    real = call(graph, _aten.to.dtype, call(graph, _aten.ne.Scalar, last, 0), torch.float32)
    return call(graph, _aten.unsqueeze.default, real, -1)
