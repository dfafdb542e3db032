"""Quantized weights that exist only while a product reads them.

A quantized weight is the end of a chain of constant nodes: a stored weight, inverse transforms, rounding offsets, a
quantize-dequantize pair. Autograd would keep every value of every chain, some 40 bytes a weight, and the weight once
for every loop. Here a step keeps the integers and scales of a chain, and the sum of its weight's gradients over all
loops. Each product makes the weight anew, forward and backward. When the backward pass has left the first product
that read a weight, the chain runs once more, and the summed gradient goes through it. A chain runs on some rows of
its weight at a time, so that its temporary tensors are small, whatever the weight's size. A weight that is stored as
latent numbers has no chain, and nothing of it is kept but those.

Under `torchrun` each process keeps rows of the integers and of the sum (`sharding`). A product gathers the integers,
and its gradient is averaged over the processes at once. So what the chain gets is the mean, the same in all processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from loopq_compile.calibration.learnable import Latent, Value
from loopq_compile.calibration.sharding import Rows, whole
from loopq_compile.calibration.weight_chain import Integers, WeightChain
from loopq_compile.graph.constants import constant_nodes
from loopq_compile.memory import trim_bounded
from loopq_compile.operators import ops
from loopq_compile.operators.latent import latent_gradients, rounded_latents
from loopq_compile.operators.precision import wide
from loopq_compile.operators.straight_through import weight_values

_PASSED = 32
"""Bytes of temporary tensors for every number of a gradient that goes through a chain."""


class HeldWeight:
    """One weight of one step.

    Args:
        chain: how the weight is computed.
        values: what the chain reads, in the order of its `targets`.
        integers: what the chain gives for these values; the codes may be divided among processes.
        summed: send the sum of all gradients through the chain, once. Otherwise each goes through it at once: no
            memory, but more work.
        gradient: type of the sum.
        rows: what this process keeps of integers and sum.
    """

    def __init__(
        self,
        chain: WeightChain,
        values: Sequence[Tensor],
        integers: Integers,
        summed: bool,
        gradient: torch.dtype,
        rows: Rows,
    ) -> None:
        self._chain, self._values, self._summed, self._type = chain, list(values), summed, gradient
        self._rows = rows
        self._codes, self._scale = integers
        self._sum: Tensor | None = None
        self._through: list[Tensor | None] = []
        self._leaves = [value for value in self._values if value.requires_grad]

    def token(self) -> Tensor | None:
        """Stands for the weight in autograd's graph; None if nothing of the chain is learned."""
        if not torch.is_grad_enabled() or not self._is_learned():
            return None
        anchor = torch.zeros((), device=self._scale.device, requires_grad=True)
        return _Token.apply(anchor, self, *self._leaves)

    def _is_learned(self) -> bool:
        return bool(self._leaves)

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
        """The gradients of what is learned, after all products have added theirs. This weight is of no use afterwards:
        autograd may hold it until long after the step, and it would keep the integers of before."""
        if self._sum is not None:
            self._pass_on(whole(self._sum))
        found = self._through or [None] * len(self._leaves)
        del self._codes, self._values, self._leaves, self._sum, self._through
        return found

    def _pass_on(self, grad: Tensor) -> None:
        """Sends a gradient of the weight through the chain."""
        tensors, chain = self._values, self._chain
        learned = [place for place, value in enumerate(tensors) if value.requires_grad]
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
        through = [found.get(place) for place in learned]
        self._through = [_sum(*pair) for pair in zip(self._through, through, strict=True)] if self._through else through
        trim_bounded(_PASSED * grad.numel())

    def _collect(self, found: dict[int, Tensor], place: int, rows: slice, gradient: Tensor, like: Tensor) -> None:
        """Adds to `found` the gradient by some rows of the tensor `like`, or by a tensor that all rows read."""
        dim, gradient = self._chain.dim(place), gradient.to(like.dtype)
        if rows == slice(None):
            found[place] = gradient
        elif dim is None:
            found[place] = gradient if place not in found else found[place] + gradient
        else:
            if place not in found:
                found[place] = torch.empty_like(like, dtype=gradient.dtype)
            found[place][(slice(None),) * dim + (rows,)] = gradient


class LatentWeight(HeldWeight):
    """A weight that is stored as latent numbers, from which each product makes its integers.

    Args:
        chain: one with a `latent`.
        numbers: the latent numbers, a tensor if they are not learned.
        scale: the scales `[N, groups]`.
        gradient, rows: as for `HeldWeight`.
    """

    def __init__(self, chain: WeightChain, numbers: Value, scale: Tensor, gradient: torch.dtype, rows: Rows) -> None:
        assert chain.latent is not None
        stored = numbers.numbers if isinstance(numbers, Latent) else numbers
        super().__init__(chain, [], (stored, scale), True, gradient, rows)
        self._latent = numbers
        self._grid = chain.group_size, chain.latent.fraction, chain.latent.q_min, chain.latent.q_max

    def _is_learned(self) -> bool:
        return isinstance(self._latent, Latent)

    def value(self, dtype: torch.dtype | None = None) -> Tensor:
        numbers, dtype = whole(self._codes), dtype or self._scale.dtype
        trim_bounded(numbers.numel() * dtype.itemsize)
        return rounded_latents(numbers, self._scale, *self._grid, dtype)

    def _pass_on(self, grad: Tensor) -> None:
        assert isinstance(self._latent, Latent)
        self._latent.add_gradient(latent_gradients(grad, whole(self._codes), self._scale, *self._grid))
        trim_bounded(_PASSED * grad.numel())


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
