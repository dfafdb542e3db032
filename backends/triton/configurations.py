"""Which tiles a kernel runs with: defaults by shape, and the grid that tuning searches.

Nothing here was measured on a GPU. The defaults and `tiles.json`, the table that comes with the package, follow from
the register and shared-memory use of compiled kernels (`ahead`), and from the arithmetic in
`loopq_compile.bench.kernels`. On a GPU, `loopq-compile bench kernels --tune` measures.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from loopq_compile.errors import LoopQError
from loopq_compile.storage.atomic import write_text

DECODE_ROWS = 16
"""Up to this many rows the decode variant runs: a tile of 16 rows, split along k."""
MIDDLE_ROWS = 128
"""Up to this many rows a product is cut into small tiles."""
WIDEST_PLAIN, WIDEST_TILE, LONGEST_SIDE = 16384, 8192, 256
"""Limits of one token in registers: numbers without a transform, numbers with a transform (its tile is padded to powers
of two), and the longest side of that tile. Tiles of 128 x 128 spill on every architecture; sides of 512 need more
shared memory than there is."""
HIGHEST_RANK = 32
"""Highest rank of adapters in a kernel; higher ones spill on every architecture."""
WIDEST_FACTORED, WIDEST_SIDE = 2048, 64
"""Tiles of up to this many numbers, with sides up to this length, are transformed in registers as a whole; wider ones
in steps, because a factor is a square of the side."""
TARGET_PROGRAMS = 264
"""The decode variant splits k until this many programs run: two for each of the 132 multiprocessors of an H100."""
SMALLEST_SHARE = 8
"""Fewest groups that a program of the decode variant adds up."""
_WIDE = ((64, 128, 4), (128, 64, 4), (128, 128, 8))
_UNFIT = {
    (32, 100): ((64, 128, 4), (128, 64, 4)),
    (64, 86): ((64, 128, 8),),
    (64, 89): ((64, 128, 8),),
    (64, 100): ((16, 128, 4),),
    (64, 120): ((16, 64, 2),),
    (128, 80): ((16, 128, 2),),
    (128, 86): _WIDE,
    (128, 89): _WIDE,
    (128, 120): _WIDE,
}
"""Rows, columns and warps of tiles that Triton 3.8.0 cannot compile without spilling (on sm_100: not at all), by group
size and architecture. `loopq-compile bench kernels --static --grid` compiles all others."""
ATTENTION_BYTES = 4096
"""Bytes of dequantized keys, and as many of values, that a program of attention holds at the same time."""
WIDEST_HEAD = 512
"""Bytes of a head in the type of queries that attention takes: 128 numbers in float32, 256 in half precision."""
SMALLEST_PART = 128
"""Fewest columns of a key-value cache for one program, if the columns are split."""
_AXES = {"rows": (64, 128), "columns": (64, 128), "warps": (4, 8), "stages": (2, 3)}
_DECODE_AXES = {"rows": (16,), "columns": (32, 64, 128), "warps": (2, 4), "stages": (3, 4, 5)}


@dataclass(frozen=True)
class Tile:
    """Tile of the matrix product: `rows x columns` outputs, warps of a program, stages of the load pipeline, and the
    number of parts into which k is split."""

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
"""Tiles that run where no table has an entry."""
KINDS = {"decode": DECODE, "middle": MIDDLE, "prefill": PREFILL}
Table = dict[str, dict[str, Tile]]
"""Tiles by architecture and group size (`table_name`) and kind of product, a key of `KINDS`."""
_forced: Tile | None = None


def kind_of(rows: int) -> str:
    """The kind of a product with this many rows, a key of `KINDS`."""
    return "decode" if rows <= DECODE_ROWS else "middle" if rows <= MIDDLE_ROWS else "prefill"


def linear_tile(rows: int, columns: int, groups: int, architecture: int | None = None, group_size: int = 32) -> Tile:
    """The tile for a product of `rows x columns` outputs over `groups` groups.

    Args:
        rows, columns, groups: sizes of the product.
        group_size: features of a group.
        architecture: compute capability times ten, to choose an entry of the tables; None for the defaults.
    """
    kind = kind_of(rows)
    tile = _forced or tile_of_kind(kind, architecture, group_size)
    if kind != "decode":
        return tile
    split = 1
    programs = -(-columns // tile.columns)
    while programs * split < TARGET_PROGRAMS and groups >= 2 * split * SMALLEST_SHARE:
        split *= 2
    return replace(tile, split=split)


def attention_tile(padded: int, element_size: int) -> int:
    """Columns of a cache that a program of attention reads at once: a power of two from 16 to 64.

    Args:
        padded: channels of a head, rounded up to a power of two.
        element_size: bytes of a dequantized number.
    """
    return min(64, max(16, ATTENTION_BYTES // (padded * element_size * element_size // 2)))


def attention_parts(programs: int, total: int) -> int:
    """Into how many parts attention cuts the columns of a cache.

    Args:
        programs: how many programs run with one part.
        total: how many columns the cache has room for.
    """
    parts = 1
    while programs * parts < TARGET_PROGRAMS and total >= 2 * parts * SMALLEST_PART:
        parts *= 2
    return parts


def table_name(architecture: int | None, group_size: int = 32) -> str:
    """The key of a table: "90" for groups of 32, as in tables that come with the package; otherwise such as
    "90/128"."""
    return str(architecture) if group_size == 32 else f"{architecture}/{group_size}"


def tile_of_kind(kind: str, architecture: int | None = None, group_size: int = 32) -> Tile:
    """The tuned tile of an architecture and group size; or the architecture's tile for groups of 32, or the default,
    narrower if that does not fit into registers."""
    tuned = tables().get(table_name(architecture, group_size), {}).get(kind)
    if tuned is not None:
        return tuned
    tile = tables().get(table_name(architecture), {}).get(kind) or KINDS[kind]
    while not fits(tile, architecture, group_size):
        tile = replace(tile, columns=tile.columns // 2)
    return tile


def fits(tile: Tile, architecture: int | None = None, group_size: int = 32) -> bool:
    """Whether a tile of the tuning grid compiles without spilling; without an architecture, on all of them."""
    where = [key for key in _UNFIT if key[0] == group_size and architecture in (None, key[1])]
    return all((tile.rows, tile.columns, tile.warps) not in _UNFIT[key] for key in where)


@contextmanager
def forcing(tile: Tile) -> Iterator[None]:
    """While it is open, every product runs with `tile`; for tuning."""
    global _forced
    before, _forced = _forced, tile
    try:
        yield
    finally:
        _forced = before


@functools.cache
def tables() -> Table:
    """The table that comes with the package, overridden by what `bench kernels --tune` found on this machine."""
    shipped = _parsed(json.loads(Path(__file__).with_name("tiles.json").read_text())["tiles"])
    try:
        own = read_table(user_table())
    except LoopQError as error:
        warnings.warn(f"{error} The tiles that come with the package are used.", stacklevel=2)
        own = {}
    return {name: shipped.get(name, {}) | own.get(name, {}) for name in {*shipped, *own}}


def user_table() -> Path:
    """Where tuning stores its results: `LOOPQ_COMPILE_TILES`, or `loopq_compile/tiles.json` in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LOOPQ_COMPILE_TILES") or Path(cache) / "loopq_compile" / "tiles.json")


def read_table(file: Path) -> Table:
    """The tiles in a file; none if there is no such file.

    Raises:
        LoopQError: it holds something else.
    """
    if not file.is_file():
        return {}
    try:
        return _parsed(json.loads(file.read_text(encoding="utf-8"))["tiles"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise LoopQError(
            f"{file} holds no tiles ({type(error).__name__}: {error}); delete it or tune again."
        ) from error


def write_table(file: Path, table: Table, how: str) -> None:
    """Merges `table` into a file, together with `how` it was found.

    Raises:
        LoopQError: the file cannot be written, or holds something else.
    """
    before = read_table(file)
    merged = {name: before.get(name, {}) | table.get(name, {}) for name in sorted({*before, *table})}
    plain = {name: {kind: tile.to_dict() for kind, tile in tiles.items()} for name, tiles in merged.items()}
    write_text(file, json.dumps({"how": how, "tiles": plain}, indent=1) + "\n")
    tables.cache_clear()


def _parsed(data: Any) -> Table:
    return {str(name): {kind: _tile(kind, tile) for kind, tile in tiles.items()} for name, tiles in data.items()}


def _tile(kind: str, data: dict[str, Any]) -> Tile:
    """A tile that the kernels support.

    Raises:
        ValueError: the kernels do not support it.
    """
    tile = Tile(**{name: int(value) for name, value in data.items()})
    sizes = (tile.rows, tile.columns, tile.warps, tile.split)
    fits = kind in KINDS and all(size > 0 and size & (size - 1) == 0 for size in sizes) and 1 <= tile.stages <= 8
    if not fits or not 16 <= tile.rows <= 256 or not 16 <= tile.columns <= 256 or tile.warps > 16:
        raise ValueError(f"{kind} {tile} is not a tile of the kernels")
    return tile


def tuning_grid(decode: bool, architecture: int | None = None, group_size: int = 32) -> list[Tile]:
    """The tiles that tuning tries, all of which compile without spilling registers."""
    axes = _DECODE_AXES if decode else _AXES
    split = 4 if decode else 1
    tiles = [Tile(m, n, warps, stages, split) for m, n, warps, stages in itertools.product(*axes.values())]
    # With 4 warps, 128 x 128 outputs take 128 registers of every thread just for the sums, and as many for the product.
    tiles = [tile for tile in tiles if tile.rows * tile.columns <= 2048 * tile.warps]
    return [tile for tile in tiles if fits(tile, architecture, group_size)]


def transform_step(rows: int, columns: int) -> int:
    """Features per step in the transform of a tile of powers of two; 0 for all at once, in registers."""
    if rows * columns <= WIDEST_FACTORED and max(rows, columns) <= WIDEST_SIDE:
        return 0
    return 32 if max(rows, columns) <= 128 else 16


def row_warps(numbers: int) -> int:
    """Warps of a program that holds one token of this many numbers (a power of two)."""
    return 16 if numbers > 8192 else min(8, max(1, numbers // 512))
