"""`quantization_config` of a folder, which says how its linears are quantized, and what vLLM documents about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from loopq_compile.backends.compressed_tensors.packing import fits_symmetric
from loopq_compile.backends.plain import PlainLinear, refuse
from loopq_compile.graph.names import shown_name

ENGINE = "compressed-tensors"
PACKED, INTEGERS = "pack-quantized", "int-quantized"
_ROW = -1
_KERNELS = (32, 64, 128, _ROW)
"""Group sizes that vLLM's kernels for packed weights document; `_ROW` is a whole row."""


@dataclass(frozen=True)
class Grid:
    """How linears of one kind are stored and computed.

    Args:
        bits: 4 or 8, of stored weights.
        group: input features that share a scale; -1 for whole rows.
        symmetric: without zero points.
        activation_group: features of a token that share a scale of 8-bit activations; -1 for all; None: not rounded.
    """

    bits: int
    group: int
    symmetric: bool = True
    activation_group: int | None = None

    @property
    def format(self) -> str:
        """8-bit weights with rounded activations are plain int8, all others are packed."""
        return INTEGERS if self.bits == 8 and self.activation_group is not None else PACKED

    def __str__(self) -> str:
        groups = "whole rows" if self.group == _ROW else f"groups of {self.group}"
        zero = "" if self.symmetric else ", with zero points"
        return f"W{self.bits}A{16 if self.activation_group is None else 8} in {groups}{zero}"

    def settings(self, targets: list[str]) -> dict[str, Any]:
        """An entry of `config_groups`."""
        weights = {
            "num_bits": self.bits, "type": "int", "symmetric": self.symmetric, "dynamic": False,
            "strategy": "channel" if self.group == _ROW else "group",
            "group_size": None if self.group == _ROW else self.group,
        }  # fmt: skip
        inputs = None
        if self.activation_group is not None:
            row = self.activation_group == _ROW
            inputs = {
                "num_bits": 8, "type": "int", "symmetric": True, "dynamic": True,
                "strategy": "token" if row else "group", "group_size": None if row else self.activation_group,
            }  # fmt: skip
        return {
            "targets": targets, "weights": weights, "input_activations": inputs, "output_activations": None,
            "format": self.format,
        }  # fmt: skip

    def remarks(self) -> list[str]:
        """What keeps vLLM, by its documents, from running this."""
        found = []
        if self.group not in _KERNELS and self.format == PACKED:
            found.append(f"vLLM documents weights in groups of 32, 64 and 128, not of {self.group}")
        if self.format == INTEGERS and (self.group, self.activation_group) != (_ROW, _ROW):
            found.append("vLLM documents W8A8 with whole rows only: compile with group_size=-1")
        if not self.symmetric and self.activation_group is not None:
            found.append("vLLM documents W4A8 without zero points only: compile with signed_scales=False")
        return found


def find_grids(linears: Iterable[PlainLinear], zero_points: bool) -> dict[str, Grid]:
    """How linears are stored, by name of the weight.

    Groups that are whole rows everywhere are written as such (`channel`, `token`), which is what engines have kernels
    for.

    Args:
        linears: the quantized ones.
        zero_points: whether weights with negative scales may get zero points.

    Raises:
        LoopQError: activations are rounded to other than 8 bits, or negative scales need zero points.
    """
    linears = list(linears)
    for linear in linears:
        if not zero_points and not fits_symmetric(linear.codes, linear.scale, stored_bits(linear)):
            remedy = (
                "Compile with signed_scales=False (--positive-scales), or allow zero points, which hold the same "
                "numbers but which not every engine loads: zero_points=True (--zero-points)."
            )
            refuse(ENGINE, "weights with negative scales", linear.node, linear.site.name, remedy)
        if linear.activation_bits not in (None, 8):
            remedy = "Use scheme 'w4a16', 'w4a8' or 'w8a8'."
            refuse(ENGINE, f"{linear.activation_bits}-bit activations", linear.node, linear.site.name, remedy)
    rows = all(linear.group == linear.codes.shape[1] for linear in linears)
    tokens = all(linear.activation_group in (None, linear.codes.shape[1]) for linear in linears)
    symmetric = all(fits_symmetric(linear.codes, linear.scale, stored_bits(linear)) for linear in linears)
    found = {}
    for linear in linears:
        inputs = None if linear.activation_group is None else _ROW if tokens else linear.activation_group
        group = _ROW if rows else linear.group
        found[shown_name(linear.site.weight)] = Grid(stored_bits(linear), group, symmetric, inputs)
    return found


def stored_bits(linear: PlainLinear) -> int:
    """4 or 8: engines have kernels for these, and narrower integers are the same numbers in them."""
    return 4 if linear.bits <= 4 else 8


def quantization_config(grids: Mapping[str, Grid], ignored: Iterable[str]) -> dict[str, Any]:
    """The entry of `config.json`.

    Args:
        grids: by name of a linear.
        ignored: names of linears that stay in floating point.
    """
    kinds = list(dict.fromkeys(grids.values()))
    names = {kind: [name for name, grid in grids.items() if grid == kind] for kind in kinds}
    if len(kinds) == 1:
        names[kinds[0]] = ["Linear"]
    formats = {kind.format for kind in kinds}
    return {
        "quant_method": ENGINE,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": kind.settings(names[kind]) for i, kind in enumerate(kinds)},
        "ignore": list(ignored),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
