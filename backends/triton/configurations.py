"""Which tiles a kernel runs with: defaults by shape, and the grid that tuning looks at.

Nothing here was measured on a GPU. The defaults follow from register and shared-memory use (`ahead`) and from the
arithmetic in `loopq_compile.bench.kernels`.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass

DECODE_ROWS = 16
"""Up to so many rows the decode variant runs: a tile of 16 rows, split along k."""
MIDDLE_ROWS = 128
"""Up to so many rows a product is cut into small tiles."""
WIDEST_PLAIN, WIDEST_TILE = 16384, 8192
"""Numbers of one token that a program holds in registers, without and with a transform (its tile is padded to powers of
two). Tiles of 128 x 128 spill on every architecture."""
WIDEST_FACTORED = 2048
"""Tiles up to so many numbers are transformed in registers as a whole, wider ones in steps."""
TARGET_PROGRAMS = 264
"""The decode variant splits k until so many programs run: two for each of the 132 multiprocessors of an H100."""
SMALLEST_SHARE = 8
"""Groups that a program of the decode variant adds up at least."""
_AXES = {"rows": (64, 128), "columns": (64, 128), "warps": (4, 8), "stages": (2, 3)}
_DECODE_AXES = {"rows": (16,), "columns": (32, 64, 128), "warps": (2, 4), "stages": (3, 4, 5)}


@dataclass(frozen=True)
class Tile:
    """Tile of the matrix product: `rows x columns` outputs, warps of a program, stages of the load pipeline, and into
    how many parts k is split."""

    rows: int
    columns: int
    warps: int
    stages: int
    split: int = 1

    def __str__(self) -> str:
        text = f"{self.rows}x{self.columns} warps={self.warps} stages={self.stages}"
        return text + (f" split={self.split}" if self.split > 1 else "")

    def to_dict(self) -> dict[str, int]:
        """Plain values for JSON."""
        return asdict(self)


PREFILL, MIDDLE, DECODE = Tile(128, 128, 8, 3), Tile(64, 64, 4, 3), Tile(16, 64, 4, 4)


def linear_tile(rows: int, columns: int, groups: int) -> Tile:
    """The default tile for a product of `rows x columns` outputs over `groups` groups."""
    if rows > MIDDLE_ROWS:
        return PREFILL
    if rows > DECODE_ROWS:
        return MIDDLE
    split = 1
    programs = -(-columns // DECODE.columns)
    while programs * split < TARGET_PROGRAMS and groups >= 2 * split * SMALLEST_SHARE:
        split *= 2
    return Tile(DECODE.rows, DECODE.columns, DECODE.warps, DECODE.stages, split)


def tuning_grid(decode: bool) -> list[Tile]:
    """The tiles that tuning tries; those that spill registers are left out by whoever compiles them."""
    axes = _DECODE_AXES if decode else _AXES
    split = 4 if decode else 1
    tiles = [Tile(m, n, warps, stages, split) for m, n, warps, stages in itertools.product(*axes.values())]
    # 128 x 128 outputs take 128 registers of every thread in 4 warps for the sums alone, and as many for the product.
    return [tile for tile in tiles if tile.rows * tile.columns <= 2048 * tile.warps]


def row_warps(numbers: int) -> int:
    """Warps of a program that holds one token of so many numbers (a power of two)."""
    return 16 if numbers > 8192 else min(8, max(1, numbers // 512))
