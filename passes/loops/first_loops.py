"""`first-loops`: the first iterations of a program's loop and its head, as a model that proposes tokens."""

from __future__ import annotations

from torch import fx

from loopq_compile.passes.base import Pass, PassResult
from loopq_compile.passes.loops.loop_cut import LoopCut


class FirstLoops(Pass):
    """Keeps K iterations of the main loop; runs after `add-cache`.

    Before: an unrolled program with a cache. After: `(input_ids, attention_mask, past_key_values.N...) -> {logits,
    state.M, present.N...}`. All before the loop and its first K iterations are as they were, so their caches, which
    keep their names, are those of the whole program. What follows the loop, the head included, reads the state after
    iteration K. `state.M` are the tensors of the new tokens that pass `last-loops` of the same K takes.

    Layers between loop and head have caches, too. They are computed from the shorter loop here, so those of tokens
    that the whole program has read must be replaced by what `last-loops` returns.

    Raises:
        LoopQError: see `LoopCut`; or iteration K has nothing like the state that the head reads.
    """

    def __init__(self, first: int = 1) -> None:
        super().__init__()
        self.first = first

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        cut = LoopCut(graph_module, self.first)
        presents = cut.presents(set(graph_module.graph.nodes) - (cut.late - cut.coda))
        for node in cut.coda:
            for read in node.all_input_nodes:
                if read in cut.late and read not in cut.coda:
                    node.replace_input_with(read, cut.counterpart(read))
        states = {carried.spec.name: carried.node for carried in cut.carried}
        cut.close({"logits": cut.results["logits"], **states, **presents})
        self.state(graph_module).note(f"{self.first} loops, {len(states)} tensors for the others")
        return PassResult(graph_module, True)
