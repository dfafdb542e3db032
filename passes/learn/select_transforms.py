"""`select-transforms`: selective loop-aware transformation (LoopQ section 4.2, appendix B.1)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, fx

from loopq_compile.calibration import distributed
from loopq_compile.calibration.batches import calibration_batches
from loopq_compile.calibration.data import regroup
from loopq_compile.calibration.objective import Objective
from loopq_compile.calibration.states import adapter_names, loop_ends
from loopq_compile.calibration.student import Student
from loopq_compile.calibration.teacher import Teacher, predictions
from loopq_compile.errors import InternalError
from loopq_compile.graph.device import device_of
from loopq_compile.graph.keys import TRANSFORM
from loopq_compile.graph.state import attach_state, copy_graph, get_state
from loopq_compile.memory import trim
from loopq_compile.passes.base import Pass, PassResult
from loopq_compile.passes.learn.calibrate import find_learnables
from loopq_compile.passes.quantize.collect_ranges import vocabulary_size
from loopq_compile.passes.transforms.widen import loop_groups, widen
from loopq_compile.progress import progress

LEAST_GROUPS = 2
"""Number of groups that are selected even if the budget is smaller."""
SEQUENCES = 16
"""Number of sequences from which gradients are taken."""
_DAMPING = 0.1
"""Epsilon of the score, relative to the median of the Fisher information."""


class SelectTransforms(Pass):
    """Gives a separate transform and weight per loop to the groups that suffer most from sharing them.

    Before: every group has one transform and one quantized weight for all loops. After: selected groups have a row of
    the transform's table, and a weight, per loop; they start with the shared values, from which calibration continues.

    A group's score is the variance of its gradient across loops, divided by the curvature (eq. 6). With `g[t, s]` the
    gradient of the loss of sequence `s` with respect to the transform in loop `t` only,

        S = Σ_tables mean_i Var_t(mean_s g[t, s, i]) / (F_i + ε),    F_i = mean_{t, s} g[t, s, i]²

    ε is a tenth of the median of F. Selection is progressive: the pass occurs several times in a pipeline, with
    calibration in between, and takes a part of the budget each time. Scores and choice go into
    `state.results["slt"]`.

    Does nothing without loops, without transforms, or when the budget is used up.

    Args:
        number: number of this round of selection, from 0.
        rounds: how many rounds the pipeline has.
    """

    def __init__(self, number: int = 0, rounds: int = 2) -> None:
        super().__init__()
        self.number, self.rounds = number, rounds

    def requires(self, graph_module: fx.GraphModule) -> None:
        state = self.state(graph_module)
        if state.run.teacher is None or state.run.calibration is None:
            raise InternalError("select-transforms needs the captured graph as a teacher, and calibration data.")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        state = self.state(graph_module)
        found = state.results.setdefault("slt", {"scores": [], "selected": [], "candidates": 0})
        with_transform = {node.meta.get(TRANSFORM) for node in graph_module.graph.nodes}
        groups = [group for group in loop_groups(graph_module) if group in with_transform]
        total = len(groups) + len(found["selected"])
        budget = min(total, max(LEAST_GROUPS, round(state.options.selection_budget * total)))
        if not state.options.selection_budget:
            budget = 0
        rounds = self.rounds
        wanted = round(budget * min(1.0, (self.number + 1) / rounds)) - len(found["selected"])
        if wanted < 1 or not groups:
            return PassResult(graph_module, False)
        scores = sharing_gaps(graph_module, groups)
        chosen = sorted(scores, key=lambda group: -scores[group])[:wanted]
        widen(graph_module, *chosen)
        found["scores"].append(scores)
        found["selected"] += chosen
        found["candidates"] = total
        state.note("selected " + ", ".join(f"{group} ({scores[group]:.3g})" for group in chosen))
        return PassResult(graph_module, bool(chosen))


def sharing_gaps(graph_module: fx.GraphModule, groups: list[str]) -> dict[str, float]:
    """The score of each of `groups`; groups without a transform that calibration may learn score zero.

    Under `torchrun` every process takes gradients of its share of the sequences.
    """
    state = get_state(graph_module)
    relaxed = copy_graph(graph_module)
    attach_state(relaxed, dataclasses.replace(state, results={}))
    widen(relaxed, *groups)
    owner = {
        str(node.target): node.meta[TRANSFORM] for node in relaxed.graph.nodes if node.meta.get(TRANSFORM) in groups
    }
    learnables = [
        item
        for item in find_learnables(relaxed, frozenset(("transform", "diagonal", "orthogonal")))
        if item.name in owner
    ]
    if not learnables:
        return dict.fromkeys(groups, 0.0)
    ends = loop_ends(relaxed)
    watched = [*ends, *adapter_names(relaxed, ends)]
    student = Student(relaxed, watched, learned={item.name for item in learnables}, equal_loops=True)
    vocabulary = vocabulary_size(relaxed)
    assert state.run.teacher is not None
    teacher = Teacher(state.run.teacher, state.signature, ends, vocabulary, state.options)
    objective = Objective(state.options, len(ends))
    sums = {item.name: torch.zeros_like(item.raw) for item in learnables}
    squares = {item.name: torch.zeros_like(item.raw[0]) for item in learnables}
    every = calibration_batches(state.run.calibration, state.signature, vocabulary, device_of(graph_module))
    batches = regroup(list(every), 1)[:SEQUENCES]
    shares = distributed.share(batches, device_of(graph_module))
    for number, inputs in enumerate(progress(shares, "Scoring transforms", len(shares))):
        with distributed.apart(), torch.enable_grad():
            targets = teacher.targets(number, inputs)
            results, known = student.run(inputs, {item.name: item.value() for item in learnables})
            logits, outputs = predictions(results, state.signature, vocabulary)
            states = [known[name] for name in ends]
            adapted = [known[name] for name in adapter_names(relaxed, ends)]
            loss = objective(logits, outputs, states, adapted, targets).total
        raws = [item.raw for item in learnables]
        gradients = torch.autograd.grad(loss, raws, allow_unused=True, materialize_grads=True)
        for item, gradient in zip(learnables, gradients, strict=True):
            sums[item.name] += gradient / len(batches)
            squares[item.name] += gradient.square().mean(0) / len(batches)
        trim()
    for learned in (sums, squares):
        distributed.total(learned.values())
    scores = dict.fromkeys(groups, 0.0)
    for name, total in sums.items():
        scores[owner[name]] += _score(total, squares[name])
    return scores


def _score(mean: Tensor, fisher: Tensor) -> float:
    """Eq. 6 for one table: gradients `[T, ...]` averaged over sequences, and their mean squares `[...]`."""
    damping = _DAMPING * fisher.median() + torch.finfo(fisher.dtype).tiny
    return float((mean.var(0, unbiased=False) / (fisher + damping)).mean())
