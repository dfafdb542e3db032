"""Chooses tiles from what compiled kernels need, for machines without measurements.

Without a GPU, one can count how many programs a multiprocessor holds at once. For long prompts, this module then takes
the tile that reads each operand least often among those with enough warps in flight to hide latency; for decoding, the
tile with the most bytes of weights in flight. This is an argument, not a measurement.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from loopq_compile.backends.triton.ahead import ARCHITECTURES, Compiled, compile_case, linear_case
from loopq_compile.backends.triton.configurations import KINDS, Table, Tile, tuning_grid

_REGISTERS = 65536
"""32-bit registers of a multiprocessor, on all architectures."""
_SHARED = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}
_WARPS = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}
"""KiB of shared memory and warps of a multiprocessor (CUDA C programming guide, table of compute capabilities)."""
_ENOUGH_WARPS = 8
_RESERVED = 1024
"""Bytes of shared memory that the system reserves for every program."""


def resident(compiled: Compiled) -> int:
    """How many programs of a kernel a multiprocessor holds at once."""
    registers = -(-compiled.registers // 8) * 8 * 32 * compiled.warps
    by_memory = _SHARED[compiled.architecture] * 1024 // (compiled.shared + _RESERVED)
    return min(_REGISTERS // registers, by_memory, _WARPS[compiled.architecture] // compiled.warps)


def choose(found: Iterable[tuple[Tile, Compiled]]) -> Table:
    """The tiles to ship, for every architecture and kind of product in `found`."""
    best: dict[tuple[int, str], tuple[tuple[float, ...], Tile]] = {}
    for tile, compiled in found:
        if compiled.problems or not resident(compiled):
            continue
        for kind in KINDS:
            if (kind == "decode") == (tile.rows == 16):
                score, key = _score(kind, tile, compiled), (compiled.architecture, kind)
                if key not in best or score > best[key][0]:
                    best[key] = (score, replace(tile, split=1))
    table: Table = {}
    for (architecture, kind), (_, tile) in sorted(best.items()):
        table.setdefault(str(architecture), {})[kind] = tile
    return table


def _score(kind: str, tile: Tile, compiled: Compiled) -> tuple[float, ...]:
    """More is better; later entries break ties."""
    programs = resident(compiled)
    warps = programs * tile.warps
    reuse = 1 / (1 / tile.rows + 1 / tile.columns)
    if kind == "decode":
        return (programs * (tile.stages - 1) * tile.columns, warps)
    if kind == "middle":  # few programs: small tiles spread over all multiprocessors
        return (-tile.rows * tile.columns, warps, tile.stages)
    return (min(warps, _ENOUGH_WARPS), reuse, warps, tile.stages)


def compile_grid(architectures: Iterable[int] = ARCHITECTURES) -> Iterable[tuple[Tile, Compiled]]:
    """Every tile of the tuning grid, compiled for w4a4 products in groups of 32."""
    for architecture in architectures:
        for tile in (*tuning_grid(True, architecture), *tuning_grid(False, architecture)):
            yield tile, compile_case(linear_case(str(tile), tile), architecture)
