"""Second step of an export: one flat graph of operators that torch.onnx knows, and of opaque ones.

Quantization, linear layers, attention and rows of tables become opaque nodes of the domain `loopq`. Constant folding
can then neither turn a dequantized weight back into floating point nor store a second, transposed copy of a tied
weight. The target decides later what the nodes become. The body of a rolled loop is written once, between two marks,
which `backends.onnx.loop` removes.

Every node has its shapes and types in `meta["val"]`. They are computed here, and once for nodes that are alike.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

import loopq_compile.operators  # noqa: F401  (registers torch.ops.loopq)
from loopq_compile.backends.onnx.decompose import DECOMPOSITIONS
from loopq_compile.backends.onnx.prepare import Origin, Prepared
from loopq_compile.backends.onnx.promotion import promoted
from loopq_compile.graph.propagation import Alike
from loopq_compile.graph.rolled import RolledLoop, goes_on, rolled_loops
from loopq_compile.graph.state import get_tensor
from loopq_compile.passes.cache.attention import SDPA, ungrouped

DOMAIN = "loopq"
"""Domain of the opaque nodes `Quantize`, `Dequantize`, `DynamicScale`, `Linear`, `Attention` and `Row`, and of
`LoopBegin` and `LoopEnd`."""

EXTENT = "loops_extent"
"""Input that represents the loop count while a rolled graph is translated: a vector with that many entries."""

_aten, _loopq = torch.ops.aten, torch.ops.loopq


class Flattener:
    """Writes a prepared graph into a new one.

    Args:
        prepared: the graph and where its nodes come from.
        expanded: names such as `aten.foo.default` of operators that torch.onnx refused; they are decomposed.

    Attributes:
        graph: the new graph.
        origins: where its nodes come from.
        tensors: what its `get_attr` nodes stand for.
    """

    def __init__(self, prepared: Prepared, expanded: Collection[str] = ()) -> None:
        self.prepared, self.expanded = prepared, expanded
        self.graph = fx.Graph()
        self.origins: dict[str, Origin] = {}
        self.tensors: dict[fx.Node, Tensor] = {}
        self.origin: Origin | None = None
        self._tracer = fx.proxy.GraphAppendingTracer(self.graph)
        self._taken: set[str] = set()
        self._constants: dict[tuple[int, str], fx.Node] = {}
        self._sizes: dict[Any, fx.Node] = {}
        self._traces: dict[Any, fx.GraphModule] = {}

    def write(self, inputs: Sequence[tuple[str, Tensor]]) -> fx.Graph:
        """The flat graph.

        Args:
            inputs: names and fake values; for a rolled graph, the last one has the loop count as its size.
        """
        nodes = [self._named(self.graph.placeholder(name), value) for name, value in inputs]
        self.mode: FakeTensorMode = inputs[0][1].fake_mode  # type: ignore[attr-defined]
        self.alike = Alike(self.mode)
        self.extent = inputs[-1][1]
        main = self.prepared.graph_module
        count = len(nodes) - bool(rolled_loops(main))
        with self.alike:
            results = self._run(main, nodes[:count])
        self.graph.output(tuple(results))
        return self.graph

    def _run(self, graph_module: fx.GraphModule, inputs: Iterable[fx.Node | int]) -> Any:
        given, made = iter(inputs), dict[fx.Node, Any]()
        for node in graph_module.graph.nodes:
            if node.op == "placeholder":
                made[node] = next(given)
                continue
            args, kwargs = map_arg((node.args, node.kwargs), made.__getitem__)
            if node.op == "output":
                return args[0]
            self.origin = self.prepared.origins.get(node.name)
            if node.op == "get_attr":
                made[node] = self._constant(graph_module, str(node.target))
            elif node.op == "call_module":
                made[node] = self._loop(graph_module.get_submodule(str(node.target)), *args)
            else:
                made[node] = self._call(node.target, args, kwargs, node.name)
        raise AssertionError("a graph without output")

    def _constant(self, graph_module: fx.GraphModule, name: str) -> fx.Node:
        key = id(graph_module), name
        if key not in self._constants:
            tensor = get_tensor(graph_module, name)
            while name in self._taken:  # constants of a decomposition
                name += "_"
            self._taken.add(name)
            node = self.graph.get_attr(name)
            self.tensors[node] = tensor
            self._constants[key] = self._named(node, self.mode.from_tensor(tensor, static_shapes=True).detach())
        return self._constants[key]

    def _call(self, target: Any, args: Any, kwargs: Any, name: str | None = None) -> Any:
        opaque = self._opaque(target, args, kwargs)
        if opaque is not None:
            return opaque
        if target is operator.getitem and not isinstance(args[0], fx.Node):
            return args[0][args[1]]  # a result of a loop
        if str(target) in self.expanded:
            return self._inline(target, target, args, kwargs)
        if target in DECOMPOSITIONS:
            return self._inline(DECOMPOSITIONS[target], target, args, kwargs)
        return self.emit(target, args, kwargs, name)

    def emit(self, target: Any, args: Any, kwargs: Any, name: str | None = None) -> fx.Node:
        """Adds a node, after casts to the types that PyTorch's operator computes in; equal sizes are one node."""
        value = self.alike.call(target, *_values((args, kwargs)))
        size = value.node.expr if isinstance(value, torch.SymInt) else None
        if size in self._sizes:
            return self._sizes[size]
        args = promoted(self, target, args, kwargs, value)
        node = self.graph.create_node("call_function", target, tuple(args), kwargs, name=name)
        if size is not None:
            self._sizes[size] = node
        return self._named(node, value)

    def _opaque(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is _loopq.quantize.default:
            x, scale, group_size, q_min, q_max = args
            attributes = {"group_size": group_size, "q_min": q_min, "q_max": q_max}
            return self._symbolic("Quantize", (x, scale), attributes, torch.int8, _shape(x))
        if target is _loopq.dequantize.default:
            codes, scale, group_size = args
            attributes = {"group_size": group_size, "bits": (self.origin.bits if self.origin else None) or 0}
            return self._symbolic("Dequantize", (codes, scale), attributes, _dtype(scale), _shape(codes))
        if target is _loopq.dynamic_scale.default:
            x, clip, group_size, limit = args
            shape = (*_shape(x)[:-1], _shape(x)[-1] // group_size)
            attributes = {"group_size": group_size, "limit": limit}
            return self._symbolic("DynamicScale", (x, clip), attributes, _dtype(x), shape)
        if target is _aten.linear.default and len(_shape(args[1])) == 2 and len(_shape(args[0])) >= 2:
            shape = (*_shape(args[0])[:-1], _shape(args[1])[0])
            return self._symbolic("Linear", (*args, *kwargs.values()), {}, _dtype(args[0]), shape)
        if target is SDPA:
            return self._attention(*args, **kwargs)
        if target is _aten.select.int and isinstance(args[2], fx.Node) and torch.is_tensor(args[2].meta["val"]):
            return self._row(args[0], args[2])
        return None

    def _attention(
        self, query: fx.Node, key: fx.Node, value: fx.Node, mask: Any = None, *rest: Any, **kwargs: Any
    ) -> Any:
        """Attention under an additive mask, on keys and values that are not copied for queries of a group."""
        ranks = {len(_shape(x)) for x in (query, key, value, mask) if isinstance(x, fx.Node)}
        other = any(rest) or any(value for name, value in kwargs.items() if name not in ("scale", "enable_gqa"))
        if mask is None or ranks != {4} or _dtype(mask) is torch.bool or other:
            return None
        key, value = ungrouped(key), ungrouped(value)
        *leading, size = _shape(query)
        groups = {_shape(key)[1], _shape(value)[1]}
        if len(groups) > 1 or (groups != {leading[1]} and _shape(mask)[1] != 1):
            return None
        scale = kwargs.get("scale") or 1 / math.sqrt(size)
        shape = (*leading, _shape(value)[-1])
        return self._symbolic("Attention", (query, key, value, mask), {"scale": scale}, _dtype(query), shape)

    def _row(self, table: fx.Node, row: fx.Node) -> fx.Node:
        return self._symbolic("Row", (table, row), {}, _dtype(table), _shape(table)[1:])

    def _symbolic(self, name: str, inputs: Any, attributes: dict[str, Any], dtype: torch.dtype, shape: Any) -> fx.Node:
        proxies = [None if x is None else fx.Proxy(x, self._tracer) for x in inputs]
        made = torch.onnx.ops.symbolic(f"{DOMAIN}::{name}", proxies, attributes, dtype=dtype, shape=[], version=1)  # type: ignore[arg-type]
        return self._named(made.node, self._empty(shape, dtype))  # type: ignore[attr-defined]

    def _symbolics(
        self, name: str, inputs: Any, attributes: dict[str, Any], dtypes: Sequence[torch.dtype], shapes: Any
    ) -> list[fx.Node]:
        proxies = [fx.Proxy(x, self._tracer) for x in inputs]
        empty: list[list[int]] = [[] for _ in dtypes]
        made = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{name}",
            proxies,  # type: ignore[arg-type]
            attributes,
            dtypes=dtypes,
            shapes=empty,
            version=1,
        )
        values = [self._empty(*pair) for pair in zip(shapes, dtypes, strict=True)]
        whole = self._named(made.node, values)  # type: ignore[attr-defined]
        return [
            self._named(self.graph.call_function(operator.getitem, (whole, i)), value) for i, value in enumerate(values)
        ]

    def _empty(self, shape: Any, dtype: torch.dtype) -> Tensor:
        return self.alike.call(_aten.empty.memory_format, (list(shape),), {"dtype": dtype, "device": "cpu"})

    def _loop(self, loop: Any, state: Sequence[fx.Node], shared: Sequence[Any], *threshold: fx.Node) -> list[fx.Node]:
        assert isinstance(loop, RolledLoop)
        about = {"number": loop.number, "count": loop.count, "rows": loop.rows, "skipped": loop.skipped}
        dtypes, shapes = list(map(_dtype, state)), list(map(_shape, state))
        begin = self._symbolics("LoopBegin", state, about, [torch.int64, torch.int64, *dtypes], [(), (), *shapes])
        row, iteration, *current = begin
        given = [self._row(x, iteration) if i in loop.scanned else x for i, x in enumerate(shared)]
        sizes = dict(self._sizes)
        results = list(self._run(loop.body, [row, *current, *given]))
        collected = results[len(current) :]
        count: Any = self.extent.shape[0] if loop.number == 0 else loop.count
        if loop.number == 0 and loop.skipped:
            count = count - loop.skipped
        dtypes += [_dtype(x) for x in collected]
        shapes += [(count, *_shape(x)) for x in collected]
        early = loop.survival is not None
        if early:
            results.append(self._inline(goes_on, goes_on, (results[loop.survival], *threshold), {}))  # type: ignore[index]
        self._sizes = sizes  # without those that the body computed from its own values
        return self._symbolics("LoopEnd", results, {"number": loop.number, "early": early}, dtypes, shapes)

    def _inline(self, function: Callable[..., Any], about: Any, args: Any, kwargs: Any) -> Any:
        """The nodes of a function instead of its call."""
        flat, structure = pytree.tree_flatten((args, kwargs))
        places = [i for i, value in enumerate(flat) if isinstance(value, fx.Node)]
        values = [flat[i].meta["val"] for i in places]
        key = about, self.alike.key(_values(flat)), structure
        if key not in self._traces:

            def call(*given: Any) -> Any:
                whole = list(flat)
                for place, value in zip(places, given, strict=True):
                    whole[place] = value
                again, named = pytree.tree_unflatten(whole, structure)
                return function(*again, **named)

            expand = str(about) in self.expanded
            table: Any = torch._decomp.core_aten_decompositions() if expand else {}
            # Values that are alike are one object, which a trace would take for one argument.
            apart = [value.detach() if isinstance(value, Tensor) else value for value in values]
            self._traces[key] = make_fx(call, table, pre_dispatch=not expand)(*apart)
        trace = self._traces[key]
        made: dict[fx.Node, Any] = {}
        given = iter([flat[i] for i in places])
        for node in trace.graph.nodes:
            if node.op == "placeholder":
                made[node] = next(given)
                continue
            inner, named = map_arg((node.args, node.kwargs), made.__getitem__)
            if node.op == "output":
                return inner[0]
            if node.op == "get_attr":
                made[node] = self._constant(trace, str(node.target))
            elif node.target is about or (str(about) in self.expanded and str(node.target) not in self.expanded):
                made[node] = self.emit(node.target, inner, named)
            else:
                made[node] = self._call(node.target, inner, named)
        raise AssertionError("a trace without output")

    def _named(self, node: fx.Node, value: Any) -> fx.Node:
        node.meta["val"] = value
        if self.origin is not None:
            self.origins[node.name] = self.origin
        return node


def _values(arguments: Any) -> Any:
    return map_arg(arguments, lambda node: node.meta["val"])


def _shape(node: fx.Node) -> tuple[Any, ...]:
    return tuple(getattr(node.meta["val"], "shape", ()))


def _dtype(node: fx.Node) -> torch.dtype:
    return node.meta["val"].dtype
