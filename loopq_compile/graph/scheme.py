"""Schemes: how many bits, in which groups, with which kind of activation scales."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from loopq_compile.errors import LoopQError, did_you_mean

_CHOICES = {
    "activation": ("static", "dynamic"),
    "activation_granularity": ("group", "tensor"),
    "weight_range": ("minmax", "mse"),
    "activation_range": ("minmax", "percentile", "mse"),
}


@dataclass(frozen=True)
class Scheme:
    """What is quantized, and how.

    Integers are symmetric and rounded to nearest, `q_min = -2^(bits-1)`, `q_max = 2^(bits-1) - 1` (LoopQ eq. 4).

    Args:
        weight_bits: width of weights, 2 to 8.
        activation_bits: width of activations, 2 to 8, or 16 for activations left in floating point.
        group_size: neighbouring input features that share one scale. It must divide the input size of every
            quantized linear. -1 means one group as wide as the input.
        activation: "static" scales are constants found in calibration; "dynamic" scales are taken from each token
            at run time, times a clip ratio found in calibration (1 without calibration data).
        activation_granularity: "group" gives every group its own range (static) or clip ratio (dynamic), "tensor"
            gives the module one. Dynamic scales follow groups in both cases.
        weight_range: "minmax" takes the largest magnitude of a group, "mse" the clipped range with the least squared
            rounding error.
        activation_range: how calibration turns statistics into ranges: "minmax", "percentile" or "mse".
        signed_scales: scales of weights, and dynamic scales of activations, get the sign that maps a group's entry of
            largest magnitude to the integer `q_min`. That is one step more than `q_max`, so the step is finer. False
            gives positive scales only, as in LoopQ eq. 4. Static scales of activations, and all scales at 8 bits, are
            positive in both cases.
        percentile: share of magnitudes inside the range, in percent, for `activation_range="percentile"`.
        skip: names or `fnmatch` patterns of linears to leave in floating point, in addition to the defaults (LM heads,
            gates of at most 8 outputs, linears that do not see the input tokens such as time embeddings).
        quantize: names or patterns of linears to quantize even if the defaults would skip them.

    Raises:
        LoopQError: a value is out of range or of the wrong type.
    """

    weight_bits: int = 4
    activation_bits: int = 4
    group_size: int = 32
    activation: str = "dynamic"
    activation_granularity: str = "group"
    weight_range: str = "mse"
    activation_range: str = "mse"
    signed_scales: bool = True
    percentile: float = 99.99
    skip: tuple[str, ...] = ()
    quantize: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_integer("weight_bits", self.weight_bits, range(2, 9))
        _check_integer("activation_bits", self.activation_bits, [*range(2, 9), 16])
        if self.group_size != -1 and (not _is_int(self.group_size) or self.group_size < 2):
            raise LoopQError(
                f"group_size must be an integer of at least 2, or -1 for whole rows; got {self.group_size!r}."
            )
        for field, choices in _CHOICES.items():
            value = getattr(self, field)
            if value not in choices:
                raise LoopQError(f"Scheme({field}={value!r}) is unknown.{did_you_mean(str(value), choices)}")
        if not isinstance(self.signed_scales, bool):
            raise LoopQError(f"signed_scales must be True or False; got {self.signed_scales!r}.")
        if not isinstance(self.percentile, int | float) or not 50 < self.percentile <= 100:
            raise LoopQError(f"percentile must lie in (50, 100]; got {self.percentile!r}.")
        for field in ("skip", "quantize"):
            patterns = getattr(self, field)
            if isinstance(patterns, str):
                raise LoopQError(f"Scheme({field}=...) takes a sequence of patterns; write ({patterns!r},).")
            if not isinstance(patterns, list | tuple | set) or not all(isinstance(item, str) for item in patterns):
                raise LoopQError(f"Scheme({field}=...) takes a sequence of patterns; got {patterns!r}.")
            object.__setattr__(self, field, tuple(patterns))

    @property
    def name(self) -> str:
        """Short name such as `w4a4`."""
        return f"w{self.weight_bits}a{self.activation_bits}"

    @property
    def quantizes_activations(self) -> bool:
        """False for weight-only schemes (`a16`)."""
        return self.activation_bits < 16

    def limit(self, bits: int) -> int:
        """The integer that a group's entry of largest magnitude becomes: `q_min` with signed scales, else `q_max`.

        At 8 bits one more integer gains nothing, and runtimes that compute in int8 expect positive scales.
        """
        return quantized_range(bits)[0 if self.signed_scales and bits < 8 else 1]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    @staticmethod
    def parse(value: str | Scheme, **overrides: Any) -> Scheme:
        """A `Scheme` from its short name ("w4a8") or a `Scheme`; `overrides` replace single fields.

        Raises:
            LoopQError: the name is not of the form `w{2..8}a{2..8,16}`, or a field is unknown.
        """
        if isinstance(value, str):
            match = re.fullmatch(r"w(\d+)a(\d+)", value.strip().lower())
            if not match:
                hint = did_you_mean(value, ("w4a4", "w4a8", "w8a8", "w4a16"))
                raise LoopQError(f"Unknown scheme {value!r}; a scheme is written w{{2..8}}a{{2..8,16}}.{hint}")
            value = Scheme(weight_bits=int(match[1]), activation_bits=int(match[2]))
        elif not isinstance(value, Scheme):
            raise LoopQError(
                f"scheme must be a name such as 'w4a4' or a loopq_compile.Scheme; got {type(value).__name__}."
            )
        known = {field.name for field in dataclasses.fields(Scheme)}
        for field in overrides:
            if field not in known:
                raise LoopQError(f"Scheme has no field {field!r}.{did_you_mean(field, known)}")
        return dataclasses.replace(value, **overrides)


def quantized_range(bits: int) -> tuple[int, int]:
    """`(q_min, q_max)` of a symmetric integer of `bits` bits, for instance `(-8, 7)`."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_integer(field: str, value: object, allowed: Any) -> None:
    if not _is_int(value) or value not in allowed:
        raise LoopQError(f"{field} must be an integer out of {', '.join(map(str, allowed))}; got {value!r}.")
