"""Reads what a kernel needs from its cubin: registers, stack (spills), and tensor-core instructions from its PTX.

A cubin is an ELF file. Its sections `.nv.info` hold records `(format: u8, attribute: u8, size: u16)`, with a payload if
the format is 4; the payload of the attributes read here is `(symbol: u32, value: u32)`.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from loopq_compile.errors import InternalError

_FRAME_SIZE, _REGISTERS = 0x11, 0x2F
_SIZED = 4
_TENSOR_CORE = re.compile(
    r"(mma\.sync\.aligned\.[\w.]+|wgmma\.mma_async\.sync\.aligned\.[\w.]+|tcgen05\.mma\.[\w.:]+)", re.ASCII
)


@dataclass(frozen=True)
class Needs:
    """What a kernel needs of a multiprocessor.

    Args:
        registers: registers of every thread.
        stack: bytes of local memory of every thread; in these kernels, only spilled registers are there.
    """

    registers: int
    stack: int


def needs(cubin: bytes) -> Needs:
    """Registers and stack of the one kernel in `cubin`.

    Raises:
        InternalError: the bytes are not a cubin, or it does not give the number of registers.
    """
    found: dict[int, int] = {}
    for name, content in _sections(cubin):
        if name == ".nv.info":
            for attribute, value in _records(content):
                found[attribute] = max(found.get(attribute, 0), value)
    if _REGISTERS not in found:
        raise InternalError("The cubin does not say how many registers its kernel uses.")
    return Needs(found[_REGISTERS], found.get(_FRAME_SIZE, 0))


def tensor_core_instructions(ptx: str) -> list[str]:
    """The tensor-core instructions in `ptx`, each once, in order, such as
    `mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32`."""
    return list(dict.fromkeys(_TENSOR_CORE.findall(ptx)))


def _sections(file: bytes) -> Iterator[tuple[str, bytes]]:
    if file[:6] != b"\x7fELF\x02\x01":
        raise InternalError("A cubin is a little-endian 64-bit ELF file; this is not one.")
    (table,) = struct.unpack_from("<Q", file, 0x28)
    size, count, names_at = struct.unpack_from("<HHH", file, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", file, table + i * size) for i in range(count)]
    names = headers[names_at]
    for name_at, _, _, _, start, length, *_ in headers:
        begin = names[4] + name_at
        yield file[begin : file.index(b"\0", begin)].decode(), file[start : start + length]


def _records(content: bytes) -> Iterator[tuple[int, int]]:
    """`(attribute, value)` of the records with a symbol and a value."""
    at = 0
    while at + 4 <= len(content):
        form, attribute, size = struct.unpack_from("<BBH", content, at)
        at += 4
        if form != _SIZED:
            continue
        if size == 8:
            yield attribute, struct.unpack_from("<II", content, at)[1]
        at += size
