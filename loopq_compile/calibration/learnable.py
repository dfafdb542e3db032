"""The tensors that calibration may change, and the coordinates in which it does.

Optimizers move every number by about the learning rate, so each kind of tensor is learned in coordinates where one
rate suits all its entries: scales and diagonals as logarithms, clip ratios as logits; latent weights are in units of
their scale in the graph already. Rotations stay rotations: they move along the Stiefel manifold by Cayley
transforms (Li et al. 2020, the optimizer of SpinQuant).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loopq_compile.calibration.sharding import Rows, divided_as, rows, with_rows
from loopq_compile.memory import trim_bounded
from loopq_compile.operators.latent import moved_latents
from loopq_compile.operators.precision import wide
from loopq_compile.operators.quantize import bounded

RATES: dict[str, float] = {
    "transform": 6e-4,
    "diagonal": 1.5e-3,
    "orthogonal": 2e-2,
    "clip": 3e-3,
    "range": 3e-3,
    "weight_clip": 3e-4,
    "rounding": 3e-3,
    "adapter": 6e-4,
}
"""Learning rates by kind, in that kind's coordinates."""
_LOGARITHMIC = ("range", "diagonal", "weight_clip")
_LOWEST_CLIP, _HIGHEST_CLIP = 0.02, 0.995
_BETAS = (0.9, 0.98)
_MOVED = 16
"""Bytes of temporary tensors for every latent number that moves."""


@dataclass
class Latent:
    """The latent numbers of one weight while its rounding is learned (`loopq::from_latent`).

    Args:
        numbers: `[N, K]` in int16.
        unit: how many of them are one step of the weight's integers.
        gradient: the loss by the weight in units of its scale, `[N, K]` in bfloat16; None before the backward pass.

    Both tensors may be divided among the processes (`sharding`). The gradient is then the mean over all of them.
    """

    numbers: Tensor
    unit: int
    gradient: Tensor | None = None

    def add_gradient(self, gradient: Tensor) -> None:
        """Adds a part of the gradient, `[N, K]` in any type, all rows."""
        part = divided_as(gradient, self.numbers)
        if self.gradient is None:
            self.gradient = part.to(torch.bfloat16)
        else:
            self.gradient += part


Value = Tensor | Latent
"""What calibration puts in the place of a constant."""


@dataclass
class Learnable:
    """One tensor of the graph that calibration changes.

    Args:
        name: name of the constant in the graph.
        kind: a key of `RATES`.
        coordinates: a leaf tensor with gradient; `Latent` for rounding.
        dtype: type of the constant, in which the graph reads the value.
    """

    name: str
    kind: str
    coordinates: Value
    dtype: torch.dtype = torch.float32

    @staticmethod
    def of(name: str, kind: str, tensor: Tensor, fraction: int = 0) -> Learnable:
        """The coordinates of `tensor`, kept in a wide type (`loopq_compile.operators.precision`); latent numbers with
        this many bits behind the point stay as they are, and their tensor is never written to."""
        x = tensor.detach()
        if kind == "rounding":
            return Learnable(name, kind, Latent(x, 1 << fraction), x.dtype)
        x = wide(x)
        if kind in _LOGARITHMIC:
            x = x.abs().clamp_min(1e-12).log()
        elif kind == "clip":
            x = x.clamp(_LOWEST_CLIP, _HIGHEST_CLIP).logit()
        return Learnable(name, kind, x.clone().requires_grad_(), tensor.dtype)

    def divide(self, rows: Rows) -> None:
        """Keeps only this process's rows of latent numbers; other kinds are small and stay whole."""
        if isinstance(self.coordinates, Latent):
            self.coordinates.numbers = rows.own(self.coordinates.numbers)

    @property
    def raw(self) -> Tensor:
        """The coordinates as a tensor, divided if `divide` was called."""
        return self.coordinates.numbers if isinstance(self.coordinates, Latent) else self.coordinates

    @property
    def gradient(self) -> Tensor | None:
        """The loss by `raw`; None if this tensor had no part in it."""
        return self.coordinates.gradient if isinstance(self.coordinates, Latent) else self.coordinates.grad

    def forget_gradient(self) -> None:
        """Sets the gradient to None."""
        if isinstance(self.coordinates, Latent):
            self.coordinates.gradient = None
        else:
            self.coordinates.grad = None

    def restore(self, raw: Tensor) -> None:
        """Goes back to coordinates of an earlier time, all rows of them."""
        if isinstance(self.coordinates, Latent):
            self.coordinates.numbers = divided_as(raw, self.raw)
        else:
            with torch.no_grad():
                self.coordinates.copy_(raw)

    def now(self) -> Tensor:
        """The coordinates as they are now, in a tensor that later steps do not change."""
        return self.raw if isinstance(self.coordinates, Latent) else self.raw.detach().clone()

    def current(self) -> Value:
        """What the student reads."""
        return self.coordinates if isinstance(self.coordinates, Latent) else self.value()

    def value(self, raw: Tensor | None = None) -> Tensor:
        """The tensor for the graph, differentiable with respect to `raw`."""
        x = self.raw if raw is None else raw
        if self.kind in _LOGARITHMIC:
            x = x.exp()
        elif self.kind == "clip":
            x = x.sigmoid()
        x = x.to(self.dtype)
        return bounded(x) if self.kind == "range" else x


class Optimizer:
    """Adam for everything but rotations, which take Cayley steps with momentum, and latent weights.

    Those move by the sign of their gradient (Cheng et al. 2023, SignRound): it learns as well as Adam here, and needs
    no moments, which would take eight bytes for every weight. A step is a few units or less, so it is rounded at random
    to a whole number.

    Args:
        learnables: what to change.
        rate: factor on `RATES`.
        steps: length of the schedule: a short warm-up, then half a cosine down to a twentieth.
    """

    def __init__(self, learnables: list[Learnable], rate: float, steps: int) -> None:
        self._rotations = [item for item in learnables if item.kind == "orthogonal"]
        self._momentum = {item.name: torch.zeros_like(item.raw) for item in self._rotations}
        self._rates = {item.name: RATES[item.kind] * rate for item in learnables}
        self._steps, self._done = steps, 0
        self._latents = [item for item in learnables if item.kind == "rounding"]
        by_rate: dict[float, list[Tensor]] = {}
        self._named = {item.name: item.raw for item in learnables if item.kind not in ("orthogonal", "rounding")}
        for name, raw in self._named.items():
            by_rate.setdefault(self._rates[name], []).append(raw)
        groups = [{"params": raws, "lr": lr, "base": lr} for lr, raws in by_rate.items()]
        self._adam = torch.optim.Adam(groups, betas=_BETAS, eps=1e-10, fused=True) if groups else None

    @property
    def factor(self) -> float:
        """The schedule's current factor, 0 to 1."""
        warmup = max(1, min(20, self._steps // 20))
        if self._done < warmup:
            return (self._done + 1) / warmup
        part = (self._done - warmup) / max(1, self._steps - warmup)
        return 0.05 + 0.95 * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * min(part, 1.0)))))

    def step(self) -> None:
        """Takes a step along the gradients, and clears them."""
        factor = self.factor
        if self._adam is not None:
            for group in self._adam.param_groups:
                group["lr"] = group["base"] * factor
            self._adam.step()
            self._adam.zero_grad(set_to_none=True)
        for item in self._rotations:
            if item.raw.grad is not None:
                self._rotate(item, factor)
                item.raw.grad = None
        for number, item in enumerate(self._latents):
            self._move(number, item, factor)
            item.forget_gradient()
            trim_bounded(_MOVED * item.raw.numel())
        self._done += 1

    @torch.no_grad()
    def _move(self, number: int, item: Learnable, factor: float) -> None:
        latent = item.coordinates
        assert isinstance(latent, Latent)
        if latent.gradient is not None:
            generator = torch.Generator().manual_seed(self._done * 1_000_003 + number)
            kept = rows(latent.numbers)
            noise = torch.rand(1, kept.shape[1], generator=generator).to(kept.device)
            step = torch.tensor(self._rates[item.name] * factor * latent.unit, device=kept.device)
            if len(kept):
                moved = moved_latents(kept, rows(latent.gradient), step, noise)
                latent.numbers = with_rows(latent.numbers, moved)

    @torch.no_grad()
    def _rotate(self, item: Learnable, factor: float) -> None:
        """`R <- (I - lr/2 A)^-1 (I + lr/2 A) R` with the skew `A` of the momentum, scaled to length one."""
        assert item.raw.grad is not None
        momentum = self._momentum[item.name].mul_(0.9).sub_(item.raw.grad)
        r = item.raw
        product = momentum @ r.transpose(-1, -2)
        skew = product - product.transpose(-1, -2)
        norm = torch.linalg.matrix_norm(skew, ord="fro", keepdim=True) / 2**0.5
        skew = skew / norm.clamp_min(1e-12) * (self._rates[item.name] * factor * r.shape[-1] ** 0.5 / 2)
        eye = torch.eye(r.shape[-1], dtype=r.dtype, device=r.device)
        r.copy_(torch.linalg.solve(eye - skew, (eye + skew) @ r))

    def state(self) -> dict[str, Tensor]:
        """Everything that a later `restore` needs to continue with the same numbers."""
        tensors = {"done": torch.tensor(self._done)}
        tensors.update({f"momentum.{name}": tensor for name, tensor in self._momentum.items()})
        if self._adam is not None:
            for name, raw in self._named.items():
                for key, value in self._adam.state.get(raw, {}).items():
                    tensors[f"adam.{key}.{name}"] = value
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores what `state` returned."""
        self._done = int(tensors["done"])
        for name, momentum in self._momentum.items():
            momentum.copy_(tensors[f"momentum.{name}"])
        if self._adam is not None:
            for name, raw in self._named.items():
                keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"adam.{key}.{name}" in tensors]
                if keys:
                    state = {key: tensors[f"adam.{key}.{name}"].to(raw.device, copy=True) for key in keys}
                    self._adam.state[raw] = state
