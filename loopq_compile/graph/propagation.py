"""Shapes and types of a graph's values, computed once for calls that are alike.

Symbolic sizes make PyTorch's shape functions slow, several milliseconds a node. The iterations of a loop, and layers of
one kind, call the same operators on the same shapes, so most results are known already.
"""

from __future__ import annotations

import contextlib
from typing import Any, Self

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode

from loopq_compile.graph.rolled import RolledLoop

_NOT_ALIKE = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)
"""Operators with these tags give new symbols in every call."""


class Alike(contextlib.ExitStack):
    """Calls operators on tensors without data, each once for arguments that are alike; a context for such calls.

    Args:
        mode: the mode of the fake tensors; it also keeps what was computed, for other graphs on the same inputs.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.mode = mode
        self.known: dict[Any, Any] = mode.__dict__.setdefault("loopq_known", {})

    def __enter__(self) -> Self:
        super().__enter__()
        # PyTorch's C++ cannot pad by symbolic sizes.
        for context in (self.mode, torch.no_grad(), enable_python_dispatcher()):
            self.enter_context(context)
        return self

    def call(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The result of `target`, a function of tensors without side effects."""
        if not isinstance(target, torch._ops.OpOverload) or any(tag in target.tags for tag in _NOT_ALIKE):
            return target(*args, **kwargs)
        key = (target, self.key(args), self.key(kwargs))
        if key not in self.known:
            self.known[key] = target(*args, **kwargs)
        return self.known[key]

    def key(self, value: Any) -> Any:
        """Equal for two values that give the same shapes and types."""
        if isinstance(value, Tensor):
            layout = (*value.shape, *value.stride(), value.storage_offset())
            return (value.dtype, value.device, value.ndim, *map(self.key, layout))
        if isinstance(value, list | tuple):
            return tuple(map(self.key, value))
        if isinstance(value, dict):
            return tuple((name, self.key(item)) for name, item in value.items())
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            return value.node.expr
        if isinstance(value, slice):
            return tuple(map(self.key, (value.start, value.stop, value.step)))
        return type(value), value


class Propagation(fx.Interpreter):
    """Runs a graph on tensors without data, and keeps every result in `node.meta["val"]`.

    Args:
        graph_module: a graph, perhaps with rolled loops.
        mode: the mode of the fake inputs.
    """

    def __init__(self, graph_module: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(graph_module, garbage_collect_values=False)
        self.alike = Alike(mode)

    def propagate(self, *inputs: Any) -> Any:
        """The graph's results for fake inputs."""
        with self.alike:
            return self.run(*inputs, enable_io_processing=False)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op != "output":
            n.meta["val"] = result
        return result

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return self.alike.mode.from_tensor(value, static_shapes=True).detach() if isinstance(value, Tensor) else value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.alike.call(target, args, kwargs)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        loop = self.fetch_attr(target)
        if not isinstance(loop, RolledLoop):
            return super().call_module(target, args, kwargs)
        return loop.repeat(Propagation(loop.body, self.alike.mode).run, *args)
