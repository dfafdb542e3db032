"""The reference backend: runs the graph in PyTorch, operator by operator. Its result is the definition."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from loopq_compile.errors import LoopQError
from loopq_compile.graph.device import device_of
from loopq_compile.graph.state import get_state

__all__ = ["ReferenceExecutable", "lower"]


class ReferenceExecutable:
    """Runs a graph module unchanged.

    Args:
        graph_module: a captured graph, before or after any pass. It is shared, not copied, so later passes change it.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.signature = get_state(graph_module).signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns for the same call, without gradients.

        Raises:
            LoopQError: the arguments do not fit the captured call.
        """
        device = device_of(self.graph_module)
        inputs = [value.to(device) for value in self.signature.bind(args, kwargs)]
        with torch.no_grad():
            return self.signature.restore(self.graph_module(*inputs))


def lower(program: Any, **options: Any) -> ReferenceExecutable:
    """A `ReferenceExecutable` for a `Program` or a graph module; there are no options.

    Raises:
        LoopQError: options were given.
    """
    if options:
        raise LoopQError(f"The reference backend takes no options; got {', '.join(options)}.")
    return ReferenceExecutable(getattr(program, "graph_module", program))
