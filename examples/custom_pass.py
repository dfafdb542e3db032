"""A pass of your own, placed into a pipeline: counts the matrix products of every loop.

    python examples/custom_pass.py

A pass gets the graph, may read or change it, and reports whether it changed anything. After every pass, the pipeline
checks that the graph is valid and that no node inside a loop has lost its loop tag.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import fx

import loopq_compile as lq
from loopq_compile.graph.loops import get_tag
from loopq_compile.models import Ouro, OuroConfig
from loopq_compile.passes import Pass, PassResult


class CountProducts(Pass):
    """Counts `aten.linear` nodes by loop and notes the result in the program's log.

    Before: a graph with loop tags (after `tag-loops`). After: the same graph.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        for node in graph_module.graph.nodes:
            if node.target is torch.ops.aten.linear.default:
                self.counts[str(get_tag(node) or "outside")] += 1
        state = self.state(graph_module)
        for where, count in self.counts.items():
            state.note(f"{where}: {count} matrix products")
        return PassResult(graph_module, False)  # nothing was changed


def main(arguments: Sequence[str] | None = None) -> Counter[str]:
    torch.manual_seed(0)
    config = OuroConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        total_ut_steps=3,
    )
    count = CountProducts()
    pipeline = lq.pipelines.symmetric().insert_after("tag-loops", count)
    print(pipeline)
    program = lq.compile(Ouro(config).eval(), torch.randint(0, 96, (2, 16)), scheme="w4a8", method=pipeline)
    for entry in program.log:
        print(entry.pass_name, "(changed the graph)" if entry.modified else "")
        for note in entry.notes:
            print("   ", note)
    return count.counts


if __name__ == "__main__":
    main()
