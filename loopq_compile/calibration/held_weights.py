"""Quantized weights that exist only while a product reads them.

A quantized weight is the end of a chain of constant nodes: a stored weight, inverse transforms, rounding offsets, a
quantize-dequantize pair. Autograd would keep every value of every chain, some 40 bytes a weight, and the weight once
for every loop. Here a step keeps the integers and scales of a chain, and the sum of its weight's gradients over all
loops. Each product makes the weight anew, forward and backward. When the backward pass has left the first product
that read a weight, the chain runs once more, and the summed gradient goes through it. A chain runs on some rows of
its weight at a time, so that its temporary tensors are small, whatever the weight's size.

Under `torchrun` each process keeps rows of the integers and of the sum (`sharding`). A product gathers the integers,
and its gradient is averaged over the processes at once. So what the chain gets is the mean, the same in all processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from loopq_compile.calibration.learnable import Offsets, Value
from loopq_compile.calibration.sharding import Rows, whole
from loopq_compile.graph.constants import constant_nodes
from loopq_compile.graph.evaluate import sources_of
from loopq_compile.memory import trim_bounded
from loopq_compile.operators import ops
from loopq_compile.operators.precision import wide
from loopq_compile.operators.straight_through import weight_codes, weight_values

_NUMBERS, _NUMBERS_ELSEWHERE = 1 << 20, 1 << 24
"""About how many numbers of a weight go through its chain at a time: on a CPU, which has them in its cache, and on
other devices, where every operation must be large."""
_PASSED = 32
"""Bytes of temporary tensors for every number of a gradient that goes through a chain."""
_BY_ROW: dict[Any, int] = {
    ops.kronecker.default: 1,
    ops.offset.default: 3,
    ops.dynamic_scale.default: 2,
    ops.fake_quantize.default: 2,
    ops.fake_quantize_dynamic.default: 2,
    torch.ops.aten.mul.Tensor: 1,  # by a diagonal
}
"""How many of an operator's arguments, from the first, have a row for every row of the weight."""

Integers = tuple[Tensor, Tensor]
"""Codes `[N, K]` and scales `[N, groups]` of a weight."""


class WeightChain:
    """The nodes from stored tensors to one quantized weight.

    Args:
        end: the `fake_quantize` or `fake_quantize_dynamic` node.
    """

    def __init__(self, end: fx.Node) -> None:
        self.name = end.name
        self._operator: Any = end.target
        x, scale, *limits = end.args
        self._limits: list[Any] = limits
        nodes = sources_of([end]) - {end}
        graph, copied = fx.Graph(), dict[fx.Node, fx.Node]()
        ordered = [node for node in end.graph.nodes if node in nodes]
        stored = [node for node in ordered if node.op == "get_attr"]
        for node in stored:
            copied[node] = graph.placeholder(node.name)
        for node in ordered:
            if node.op != "get_attr":
                copied[node] = graph.node_copy(node, copied.__getitem__)
        graph.output((copied[x], copied[scale]))  # type: ignore[index]
        self._parts = fx.GraphModule(torch.nn.Module(), graph)
        by_row = _read_by_row(end)
        self._by_row = [by_row.get(node) for node in stored]
        self.targets = tuple(str(node.target) for node in stored)
        """Names of the stored tensors that the chain reads."""

    @property
    def group_size(self) -> int:
        """Features per scale."""
        return self._limits[0]

    def codes(self, tensors: Sequence[Tensor]) -> Integers:
        """Integers `[N, K]` and scales `[N, groups]` of the weight, without gradients."""
        size, q_min, q_max, *limit = self._limits
        found: list[Integers] = []
        with torch.no_grad(), torch.autocast(tensors[0].device.type, enabled=False):
            for rows in self.parts(tensors):
                x, scale = self._parts(*self.some(tensors, rows))
                if self._operator is ops.fake_quantize_dynamic.default:
                    scale = ops.dynamic_scale(x, scale, size, *limit)
                found.append((weight_codes(x, scale, size, q_min, q_max), scale))
        if len(found) == 1:
            return found[0]
        return torch.cat([codes for codes, _ in found]), torch.cat([scale for _, scale in found])

    def value(self, tensors: Sequence[Tensor]) -> Tensor:
        """The quantized weight `[N, K]`, differentiable with respect to `tensors`; or some rows of it, from `some`."""
        return self._operator(*self._parts(*tensors), *self._limits)

    def parts(self, tensors: Sequence[Tensor]) -> list[slice]:
        """The rows that go through the chain together, in turn; all at once if its operators do not allow less.

        Args:
            tensors: what the chain reads.
        """
        known = list(zip(tensors, self._by_row, strict=True))
        shapes = [x.shape[dim:] for x, dim in known if dim is not None]
        largest = max(shapes, key=math.prod, default=torch.Size())
        alike = all(len(shape) == 2 and shape[0] == largest[0] for shape in shapes)
        # A factor as large as the weight may belong to its rows.
        if not shapes or not alike or any(x.shape[-2:] == largest for x, dim in known if dim is None):
            return [slice(None)]
        count, most = largest[0], _NUMBERS if tensors[0].device.type == "cpu" else _NUMBERS_ELSEWHERE
        size = -(-count // -(-math.prod(largest) // most))
        return [slice(begin, begin + size) for begin in range(0, count, size)]

    def dim(self, place: int) -> int | None:
        """Where the tensor at this place of `targets` has the rows of the weight; None if it has none."""
        return self._by_row[place]

    def some(self, tensors: Sequence[Tensor], rows: slice) -> list[Tensor]:
        """What the chain reads for some rows of its weight."""
        if rows == slice(None):
            return list(tensors)
        return [
            x if dim is None else x[(slice(None),) * dim + (rows,)]
            for x, dim in zip(tensors, self._by_row, strict=True)
        ]


class HeldWeight:
    """One weight of one step.

    Args:
        chain: how the weight is computed.
        values: what the chain reads, in the order of its `targets`.
        integers: what the chain gives for these values.
        summed: send the sum of all gradients through the chain, once. Otherwise each goes through it at once: no
            memory, but more work.
        gradient: type of the sum.
        rows: what this process keeps of integers and sum.
    """

    def __init__(
        self,
        chain: WeightChain,
        values: Sequence[Value],
        integers: Integers,
        summed: bool,
        gradient: torch.dtype,
        rows: Rows,
    ) -> None:
        self._chain, self._values, self._summed, self._type = chain, list(values), summed, gradient
        self._rows = rows
        codes, self._scale = integers
        self._codes = rows.own(codes)
        self._sum: Tensor | None = None
        self._through: list[Tensor | None] = []
        self._leaves = [value for value in self._values if isinstance(value, Tensor) and value.requires_grad]

    def token(self) -> Tensor | None:
        """Stands for the weight in autograd's graph; None if nothing of the chain is learned."""
        if not torch.is_grad_enabled() or not any(map(_is_learned, self._values)):
            return None
        anchor = torch.zeros((), device=self._scale.device, requires_grad=True)
        return _Token.apply(anchor, self, *self._leaves)

    def value(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight `[N, K]`, in its own type or in `dtype`."""
        codes, dtype = whole(self._codes), dtype or self._scale.dtype
        trim_bounded(codes.numel() * dtype.itemsize)
        return weight_values(codes, self._scale, self._chain.group_size, dtype)

    def add(self, grad: Tensor, x: Tensor) -> None:
        """Adds the gradient of one product, from those of its output `[n, N]` and its input `[n, K]`."""
        if not self._summed:
            self._pass_on(whole(self._rows.mean(grad.t() @ x)))
        elif self._sum is None:
            self._sum = self._rows.mean(grad.t() @ x).to(self._type)
        elif self._sum.dtype == x.dtype and self._rows.mesh is None:
            self._sum.addmm_(grad.t(), x)
        else:
            self._sum += self._rows.mean(grad.t() @ x)

    def gradients(self) -> list[Tensor | None]:
        """The gradients of what is learned, after all products have added theirs."""
        if self._sum is not None:
            self._pass_on(whole(self._sum))
            self._sum = None
        return self._through or [None] * len(self._leaves)

    def _pass_on(self, grad: Tensor) -> None:
        """Sends a gradient of the weight through the chain."""
        learned = [place for place, value in enumerate(self._values) if _is_learned(value)]
        tensors, chain = self._tensors(), self._chain
        found: dict[int, Tensor] = {}
        for rows in chain.parts(tensors):
            some = chain.some(tensors, rows)
            with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
                for place in learned:
                    some[place] = wide(some[place].detach()).requires_grad_()
                weight = chain.value(some)
            leaves = [some[place] for place in learned]
            gradients = torch.autograd.grad(weight, leaves, grad[rows].to(weight.dtype), allow_unused=True)
            for place, gradient in zip(learned, gradients, strict=True):
                if gradient is not None:
                    self._collect(found, place, rows, gradient, tensors[place])
        through = []
        for place in learned:
            value, total = self._values[place], found.get(place)
            if not isinstance(value, Offsets):
                through.append(total)
            elif total is not None:
                value.add_gradient(total)
        self._through = [_sum(*pair) for pair in zip(self._through, through, strict=True)] if self._through else through
        trim_bounded(_PASSED * grad.numel())

    def _collect(self, found: dict[int, Tensor], place: int, rows: slice, gradient: Tensor, like: Tensor) -> None:
        """Adds to `found` the gradient by some rows of the tensor `like`, or by a tensor that all rows read."""
        value, dim = self._values[place], self._chain.dim(place)
        gradient = gradient.to(torch.bfloat16 if isinstance(value, Offsets) else like.dtype)
        if rows == slice(None):
            found[place] = gradient
        elif dim is None:
            found[place] = gradient if place not in found else found[place] + gradient
        else:
            if place not in found:
                found[place] = torch.empty_like(like, dtype=gradient.dtype)
            found[place][(slice(None),) * dim + (rows,)] = gradient

    def _tensors(self) -> list[Tensor]:
        return tensors_of(self._values)


def _read_by_row(end: fx.Node) -> dict[fx.Node, int | None]:
    """By stored tensor of a chain, the dimension that has the rows of the weight; None for what all rows read. Empty if
    the chain does not tell."""
    found: dict[fx.Node, int | None] = {}
    stack: list[tuple[Any, int | None]] = [(end, 0)]
    while stack:
        node, dim = stack.pop()
        if not isinstance(node, fx.Node):
            continue
        if node.op == "get_attr":
            if found.setdefault(node, dim) != dim:
                return {}
        elif dim is None:
            stack.extend((argument, None) for argument in node.all_input_nodes)
        elif node.target is torch.ops.aten.select.int and dim == 0 and node.args[1] == 0:
            stack.append((node.args[0], 1))
        elif node.target in _BY_ROW and dim == 0:
            count = _BY_ROW[node.target]
            stack += [(argument, 0 if place < count else None) for place, argument in enumerate(node.args)]
        else:
            return {}
    return found


def tensors_of(values: Sequence[Value]) -> list[Tensor]:
    """The values as a chain reads them, whole."""
    return [whole(value.steps) if isinstance(value, Offsets) else value for value in values]


def _is_learned(value: Value) -> bool:
    return isinstance(value, Offsets) or value.requires_grad


def _sum(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    return y if x is None else x if y is None else x + y


class _Token(torch.autograd.Function):
    """Has the learned tensors as inputs. Autograd comes back to it after every product that got the token."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, held: HeldWeight, *leaves: Tensor) -> Tensor:
        ctx.held = held
        return anchor.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, None, *ctx.held.gradients()


class _Product(torch.autograd.Function):
    """`linear` with a held weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor | None, bias: Tensor | None, held: HeldWeight) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        if x.dtype == torch.float64:
            dtype = None
        weight = held.value(dtype)
        ctx.held, ctx.type, ctx.weight_type = held, x.dtype, weight.dtype
        ctx.bias_type = None if bias is None else bias.dtype
        cast = x.to(weight.dtype)
        ctx.save_for_backward(cast)
        return F.linear(cast, weight, None if bias is None else bias.to(weight.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1]).to(x.dtype)
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (rows @ ctx.held.value(ctx.weight_type)).view(x.shape).to(ctx.type)
        if ctx.needs_input_grad[1]:
            ctx.held.add(rows, x.reshape(-1, x.shape[-1]))
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0).to(ctx.bias_type)
        token = rows.new_zeros((), dtype=torch.float32) if ctx.needs_input_grad[1] else None
        return grad_x, token, grad_bias, None


def held_linear(x: Tensor, held: tuple[HeldWeight, Tensor | None], bias: Tensor | None = None) -> Tensor:
    """`linear(x, weight, bias)` with a weight that is made for this product.

    Args:
        x: `[..., K]`.
        held: the weight `[N, K]`, and its token.
        bias: `[N]`.
    """
    weight, token = held
    return _Product.apply(x, token, bias, weight)


def hold_weights(graph: fx.Graph) -> list[WeightChain]:
    """Makes linears read held weights: their chains leave `graph`, a constant stands for each.

    The value of this constant, which has the name of the chain, is what `held_linear` takes. Weights that anything but
    a linear reads stay as they are.
    """
    chains: list[WeightChain] = []
    for end, readers in _weights(graph).items():
        chain = WeightChain(end)
        with graph.inserting_before(end):
            stand = graph.create_node("get_attr", f"held.{chain.name}", name=f"{chain.name}_held")
        end.replace_all_uses_with(stand)
        graph.erase_node(end)
        chain.name = stand.name
        chains.append(chain)
        for reader in readers:
            reader.target = held_linear
    graph.eliminate_dead_code()
    return chains


def _weights(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Quantized weights, and the linears that read them."""
    constant = constant_nodes(graph)
    found: dict[fx.Node, list[fx.Node]] = {}
    for end in graph.nodes:
        if end in constant and end.target in (ops.fake_quantize.default, ops.fake_quantize_dynamic.default):
            readers = list(end.users)
            if readers and all(_reads_weight(reader, end) for reader in readers):
                found[end] = readers
    return found


def _reads_weight(linear: fx.Node, end: fx.Node) -> bool:
    is_linear = linear.target is torch.ops.aten.linear.default and linear.args[1] is end and linear.args[0] is not end
    return is_linear and not linear.kwargs
