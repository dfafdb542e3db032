"""`last-loops`: the iterations of a program's loop that `first-loops` left out."""

from __future__ import annotations

from torch import fx

from loopq_compile.passes.base import Pass, PassResult
from loopq_compile.passes.loops.loop_cut import LoopCut


class LastLoops(Pass):
    """Leaves out K iterations of the main loop; runs after `add-cache`.

    Before: an unrolled program with a cache. After: `(input_ids, attention_mask, state.M..., past_key_values.N...) ->
    {logits, present.N...}`: iterations from number K on, and what follows the loop. `state.M` are the results of pass
    `first-loops` for the same new tokens, of one call or of several joined along the axis of the tokens. Together the
    two compute what the whole program does. Of `input_ids` only the shape counts here.

    Raises:
        LoopQError: see `LoopCut`.
    """

    def __init__(self, first: int = 1) -> None:
        super().__init__()
        self.first = first

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        cut = LoopCut(graph_module, self.first)
        place = cut.mask
        for carried in cut.carried:
            with graph_module.graph.inserting_after(place):
                place = graph_module.graph.placeholder(carried.spec.name.replace(".", "_"))
            for user in [user for user in carried.node.users if user in cut.late]:
                user.replace_input_with(carried.node, place)
        cut.close(
            {"logits": cut.results["logits"], **cut.presents(cut.late)}, [carried.spec for carried in cut.carried]
        )
        self.state(graph_module).note(f"all but {self.first} loops")
        return PassResult(graph_module, True)
