"""`RolledLoop`: the iterations of a loop as one module, which a rolled graph calls as a `call_module` node.

PyTorch's own operators do not fit: `scan` slices every table it is given, weights included, and stops where the
tables end; `while_loop` cannot collect what its iterations return. Here the body is a graph of its own that reads
tables by a row number. Whatever else it reads is passed in as arguments, so the program stays the only owner of its
tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor


class RolledLoop(nn.Module):
    """Runs `body` repeatedly, each time on the state that the previous iteration left.

    Args:
        body: a graph `(row, *state, *shared) -> (*state, *collected)` without tensors of its own. `row` is an integer.
        count: number of iterations, at least 1.
        rows: rows of the tables that the body reads. Iterations beyond that read the last row (LoopQ appendix C.2).
        skipped: iterations placed before the loop because they differ from the others.
        number: which of the program's loops this is (`LoopTag.loops[0]`).
        scanned: which shared values (key-value caches `[loops, ...]`) are passed to the body one entry at a time, that
            of its iteration.
        survival: for loops that stop early, which part of the state holds every token's probability of going on; see
            the pass `exit-early`. None: all iterations run.
    """

    def __init__(
        self,
        body: fx.GraphModule,
        count: int,
        rows: int,
        skipped: int = 0,
        number: int = 0,
        scanned: Sequence[int] = (),
        survival: int | None = None,
    ) -> None:
        super().__init__()
        self.scanned, self.survival = tuple(scanned), survival
        self.body, self.count, self.rows, self.skipped, self.number = body, count, rows, skipped, number

    def forward(self, state: Sequence[Tensor], shared: Sequence[Any], *threshold: Tensor) -> tuple[Tensor, ...]:
        """The state after the last iteration, then everything collected, `[count, ...]` each.

        Args:
            state: what the first iteration starts from.
            shared: tensors and sizes that all iterations read.
            threshold: a number, if the loop may stop early (`goes_on`). Iterations that do not run contribute the
                results of the last one that did.
        """
        return self.repeat(self.body, state, shared, *threshold)

    def repeat(
        self, body: Callable[..., Any], state: Sequence[Tensor], shared: Sequence[Any], *threshold: Tensor
    ) -> tuple[Tensor, ...]:
        """The same, with something else that computes what `body` does."""
        current, collected = list(state), []
        for iteration in range(self.count):
            given = [x[iteration] if i in self.scanned else x for i, x in enumerate(shared)]
            results = body(min(iteration, self.rows - 1), *current, *given)
            current = list(results[: len(current)])
            collected.append(results[len(current) :])
            if self.survival is not None and not _may_go_on(current[self.survival], *threshold):
                break
        collected += collected[-1:] * (self.count - len(collected))
        return (*current, *(torch.stack(values) for values in zip(*collected, strict=True)))

    def extra_repr(self) -> str:
        early = "" if self.survival is None else f", survival={self.survival}"
        return f"count={self.count}, rows={self.rows}, skipped={self.skipped}{early}"


def goes_on(survival: Tensor, threshold: Tensor) -> Tensor:
    """Whether a loop runs once more: it does while some token's probability of having stopped is below `threshold`.

    Args:
        survival: each token's probability of not having stopped so far, 0 for tokens that do not count.
        threshold: a number. From 1 on the loop never stops early, not even where probabilities are rounded to 1.

    Returns:
        A bool tensor without dimensions.
    """
    return (survival.amax(list(range(survival.ndim))) > 1 - threshold) | (threshold >= 1)


def _may_go_on(survival: Tensor, threshold: Tensor) -> bool:
    # Without values (shapes are being inferred), all iterations run.
    return isinstance(survival, FakeTensor) or bool(goes_on(survival, threshold))


def rolled_loops(graph_module: fx.GraphModule) -> list[RolledLoop]:
    """The rolled loops that a graph calls, in order; none before `roll-loops`."""
    modules = [graph_module.get_submodule(str(n.target)) for n in graph_module.graph.nodes if n.op == "call_module"]
    return [module for module in modules if isinstance(module, RolledLoop)]
