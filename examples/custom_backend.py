"""A backend of your own: runs programs in PyTorch with weights dequantized once, not in every call.

    python examples/custom_backend.py

A backend is any object with a function `lower(program, **options)` that returns something called like the program. All
of the quantization is in the graph, so a backend translates nodes and needs to know nothing about the method. A package
declares its backend in `pyproject.toml`, and `program.lower("prefolded")` finds it:

    [project.entry-points."loopq_compile.backends"]
    prefolded = "my_package.prefolded"
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tiny_model import tiny_model, tokens
from torch import fx

import loopq_compile as lq
from loopq_compile.backends import register_backend
from loopq_compile.graph.constants import constant_nodes, evaluate
from loopq_compile.graph.insert import add_constant
from loopq_compile.graph.state import copy_graph, get_state
from loopq_compile.operators import ops


class Prefolded:
    """The backend."""

    def lower(self, program: Any, **options: Any) -> Callable[..., Any]:
        """Copies the graph and replaces what is computed only from weights by its value.

        Raises:
            LoopQError: options were given; there are none.
        """
        if options:
            raise lq.LoopQError(f"The backend prefolded takes no options; got {', '.join(options)}.")
        graph_module: fx.GraphModule = copy_graph(getattr(program, "graph_module", program))
        constant = constant_nodes(graph_module.graph)
        weights = [n for n in graph_module.graph.nodes if n in constant and n.target is ops.dequantize.default]
        for node, value in list(evaluate(graph_module, weights)):
            node.replace_all_uses_with(add_constant(graph_module, f"folded_{node.name}", value.detach().clone()))
        graph_module.graph.eliminate_dead_code()
        graph_module.recompile()
        signature = get_state(graph_module).signature

        def run(*args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                return signature.restore(graph_module(*signature.bind(args, kwargs)))

        return run


def main(arguments: Sequence[str] | None = None) -> float:
    register_backend("prefolded", Prefolded())
    program = lq.compile(tiny_model(), tokens(), scheme="w4a8", method="symmetric")
    executable = program.lower("prefolded")
    ids = tokens(1)
    for name, run in (("program", program), ("prefolded", executable)):
        start = time.perf_counter()
        for _ in range(5):
            logits = run(ids).logits
        print(f"{name}: {(time.perf_counter() - start) / 5 * 1e3:.1f} ms a call")
    difference = float((logits - program(ids).logits).abs().max())
    print(f"largest difference of logits: {difference:.1e}")
    return difference


if __name__ == "__main__":
    main()
