"""Quantized weights that exist only while a product reads them.

A quantized weight is the end of a chain of constant nodes: a stored weight, inverse transforms, rounding offsets, a
quantize-dequantize pair. Autograd would keep every value of every chain, some 40 bytes a weight, and the weight once
for every loop. Here a step keeps the integers and scales of a chain, and the sum of its weight's gradients over all
loops. Each product makes the weight anew, forward and backward. When the backward pass has left the first product
that read a weight, the chain runs once more, and the summed gradient goes through it.

Under `torchrun` each process keeps rows of the integers and of the sum (`sharding`). A product gathers the integers,
and its gradient is averaged over the processes at once. So what the chain gets is the mean, the same in all processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from loopq_compile.calibration.learnable import Offsets, Value
from loopq_compile.calibration.sharding import Rows, whole
from loopq_compile.graph.constants import constant_nodes
from loopq_compile.graph.evaluate import sources_of
from loopq_compile.memory import trim
from loopq_compile.operators import ops
from loopq_compile.operators.precision import wide
from loopq_compile.operators.straight_through import weight_codes, weight_values

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
        self.targets = tuple(str(node.target) for node in stored)
        """Names of the stored tensors that the chain reads."""

    @property
    def group_size(self) -> int:
        """Features per scale."""
        return self._limits[0]

    def codes(self, tensors: Sequence[Tensor]) -> Integers:
        """Integers `[N, K]` and scales `[N, groups]` of the weight, without gradients."""
        with torch.no_grad(), torch.autocast(tensors[0].device.type, enabled=False):
            x, scale = self._parts(*tensors)
            size, q_min, q_max, *limit = self._limits
            if self._operator is ops.fake_quantize_dynamic.default:
                scale = ops.dynamic_scale(x, scale, size, *limit)
            return weight_codes(x, scale, size, q_min, q_max), scale

    def value(self, tensors: Sequence[Tensor]) -> Tensor:
        """The quantized weight `[N, K]`, differentiable with respect to `tensors`."""
        return self._operator(*self._parts(*tensors), *self._limits)


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
        return weight_values(whole(self._codes), self._scale, self._chain.group_size, dtype or self._scale.dtype)

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
            trim()
        return self._through or [None] * len(self._leaves)

    def _pass_on(self, grad: Tensor) -> None:
        """Sends a gradient of the weight through the chain."""
        learned = {place: value for place, value in enumerate(self._values) if _is_learned(value)}
        tensors = self._tensors()
        with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
            for place in learned:
                tensors[place] = wide(tensors[place].detach()).requires_grad_()
            weight = self._chain.value(tensors)
        found = torch.autograd.grad(weight, [tensors[i] for i in learned], grad.to(weight.dtype), allow_unused=True)
        through: list[Tensor | None] = []
        for value, part in zip(learned.values(), found, strict=True):
            if not isinstance(value, Offsets):
                through.append(None if part is None else part.to(value.dtype))
            elif part is not None:
                value.add_gradient(part)
        self._through = [_sum(*pair) for pair in zip(self._through, through, strict=True)] if self._through else through

    def _tensors(self) -> list[Tensor]:
        return tensors_of(self._values)


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
