"""`select-transforms`: selective loop-aware transformation (LoopQ section 4.2, appendix B.1)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, fx

from loopq_compile.calibration import distributed
from loopq_compile.calibration.batches import calibration_batches
from loopq_compile.calibration.data import Batch, regroup
from loopq_compile.calibration.objective import Objective
from loopq_compile.calibration.states import adapter_names, loop_ends
from loopq_compile.calibration.student import Student
from loopq_compile.calibration.teacher import Teacher, predictions
from loopq_compile.errors import InternalError
from loopq_compile.graph.device import device_of
from loopq_compile.graph.keys import TRANSFORM
from loopq_compile.graph.state import attach_state, copy_graph, get_state
from loopq_compile.graph.weights import quantized_weights
from loopq_compile.memory import trim
from loopq_compile.operators.fusion import fusing
from loopq_compile.operators.precision import products_in
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
        groups, wanted = self.candidates(graph_module)
        if wanted < 1:
            return PassResult(graph_module, False)
        self.choose(graph_module, sharing_gaps(graph_module, groups), wanted)
        return PassResult(graph_module, True)

    def candidates(self, graph_module: fx.GraphModule) -> tuple[list[str], int]:
        """The groups to choose from, and how many of them this round takes."""
        state = self.state(graph_module)
        found = state.results.setdefault("slt", {"scores": [], "selected": [], "candidates": 0})
        with_transform = {node.meta.get(TRANSFORM) for node in graph_module.graph.nodes}
        groups = [group for group in loop_groups(graph_module) if group in with_transform]
        total = len(groups) + len(found["selected"])
        budget = min(total, max(LEAST_GROUPS, round(state.options.selection_budget * total)))
        if not state.options.selection_budget or not groups:
            return groups, 0
        return groups, round(budget * min(1.0, (self.number + 1) / self.rounds)) - len(found["selected"])

    def choose(self, graph_module: fx.GraphModule, scores: dict[str, float], wanted: int) -> None:
        """Gives the `wanted` groups with the highest `scores` transforms and weights of their own in every loop."""
        state = self.state(graph_module)
        chosen = sorted(scores, key=lambda group: -scores[group])[:wanted]
        widen(graph_module, *chosen)
        found = state.results["slt"]
        found["candidates"] = len(scores) + len(found["selected"])
        found["scores"].append(scores)
        found["selected"] += chosen
        state.note("selected " + ", ".join(f"{group} ({scores[group]:.3g})" for group in chosen))


def sharing_gaps(graph_module: fx.GraphModule, groups: list[str]) -> dict[str, float]:
    """The score of each of `groups`; groups without a transform that calibration may learn score zero.

    Under `torchrun` every process takes gradients of its share of the sequences.
    """
    scoring = Scoring(graph_module, groups)
    for number in progress(range(len(scoring.batches)), "Scoring transforms", len(scoring.batches)):
        scoring.add(number)
    return scoring.scores()


class Scoring:
    """Gradients of the transforms that `groups` would have in every loop, sequence by sequence.

    Args:
        graph_module: the program's graph; it stays as it is.
        groups: as `SelectTransforms.candidates` gives them.
    """

    def __init__(self, graph_module: fx.GraphModule, groups: list[str]) -> None:
        state = get_state(graph_module)
        self._options, self._fused = state.options, state.options.fuses(weights=quantized_weights(graph_module))
        relaxed = copy_graph(graph_module)
        attach_state(relaxed, dataclasses.replace(state, results={}))
        widen(relaxed, *groups)
        self._signature, self._groups = state.signature, groups
        nodes = [node for node in relaxed.graph.nodes if node.meta.get(TRANSFORM) in groups]
        self._owner = {str(node.target): node.meta[TRANSFORM] for node in nodes}
        kinds = frozenset(("transform", "diagonal", "orthogonal"))
        self._learnables = [item for item in find_learnables(relaxed, kinds) if item.name in self._owner]
        self._sums = {item.name: torch.zeros_like(item.raw) for item in self._learnables}
        self._squares = {item.name: torch.zeros_like(item.raw[0]) for item in self._learnables}
        self.batches: list[Batch] = []
        """The sequences of this process."""
        if not self._learnables:
            return
        self._ends = loop_ends(relaxed)
        self._adapters = adapter_names(relaxed, self._ends)
        self._vocabulary = vocabulary_size(relaxed)
        every = calibration_batches(state.run.calibration, state.signature, self._vocabulary, device_of(graph_module))
        sequences = regroup(list(every), 1)[:SEQUENCES]
        self._count = len(sequences)
        self.batches = distributed.share(sequences, device_of(graph_module))
        watched = [*self._ends, *self._adapters]
        self._student = Student(relaxed, watched, learned={item.name for item in self._learnables}, equal_loops=True)
        assert state.run.teacher is not None
        self._teacher = Teacher(state.run.teacher, state.signature, self._ends, self._vocabulary, state.options)
        self._objective = Objective(state.options, len(self._ends))

    def add(self, number: int) -> None:
        """Adds the gradients of one sequence."""
        inputs = self.batches[number]
        with fusing(self._fused), distributed.apart(), torch.enable_grad():
            self._add(number, inputs)
        trim()

    def _add(self, number: int, inputs: Batch) -> None:
        targets = self._teacher.targets(number, inputs)
        with products_in(self._options.precision, inputs[0].device):
            results, known = self._student.run(inputs, {item.name: item.value() for item in self._learnables})
            logits, outputs = predictions(results, self._signature, self._vocabulary)
            states = [known[name] for name in self._ends]
            adapted = [known[name] for name in self._adapters]
            loss = self._objective(logits, outputs, states, adapted, targets).total
        raws = [item.raw for item in self._learnables]
        gradients = torch.autograd.grad(loss, raws, allow_unused=True, materialize_grads=True)
        for item, gradient in zip(self._learnables, gradients, strict=True):
            self._sums[item.name] += gradient / self._count
            self._squares[item.name] += gradient.square().mean(0) / self._count

    def scores(self) -> dict[str, float]:
        """The score of every group, from the sequences that all processes added."""
        for learned in (self._sums, self._squares):
            distributed.total(learned.values())
        scores = dict.fromkeys(self._groups, 0.0)
        for name, total in self._sums.items():
            scores[self._owner[name]] += _score(total, self._squares[name])
        return scores


def _score(mean: Tensor, fisher: Tensor) -> float:
    """Eq. 6 for one table: gradients `[T, ...]` averaged over sequences, and their mean squares `[...]`."""
    damping = _DAMPING * fisher.median() + torch.finfo(fisher.dtype).tiny
    return float((mean.var(0, unbiased=False) / (fisher + damping)).mean())
