"""`bench kernels`: what the Triton kernels need of a GPU, compiled without one, and an estimate of their speed.

The estimate is a roofline. Memory, tensor cores, and ordinary float32 arithmetic each need some time at the rates of
the data sheet; the largest of the three is a lower bound for a launch. Real kernels are slower. For the matrix product,
the float32 part is the cost of scaling: for every output and group a subtraction (integer to float), a product of
scales, and a multiply-add. Other kernels are bound by the bytes of each token, their transforms by tensor cores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from loopq_compile.bench.results import Report
from loopq_compile.errors import LoopQError

if TYPE_CHECKING:
    from loopq_compile.backends.triton.ahead import Compiled

COLUMNS = ("kernel", "sm", "registers", "spilled", "shared KiB", "tensor-core instruction", "verdict")
ESTIMATE_COLUMNS = ("kernel", "rows", "device", "µs at least", "bound by", "times bf16")
GROUP_SIZES = (32, 64, 128)
"""Group sizes that kernels support: a group is one step along k."""
SCALING = 3
"""Float32 instructions per output and group."""


@dataclass(frozen=True)
class Device:
    """Peak rates from a data sheet, dense (without sparsity).

    Args:
        name: name of the GPU.
        bandwidth: rate of memory, in GB/s.
        int8, bf16: rates of tensor cores, in 10^12 operations per second; a multiply-add counts as two.
        fp32: rate outside tensor cores, in the same unit.
    """

    name: str
    bandwidth: float
    int8: float
    bf16: float
    fp32: float


DEVICES = (
    Device("A100 SXM 80GB", 2039, 624, 312, 19.5),
    Device("H100 SXM", 3350, 1979, 989, 67),
    Device("RTX 4090", 1008, 661, 165, 82.6),
    Device("RTX 5090", 1792, 838, 209.5, 104.8),
)
"""NVIDIA A100 and H100 data sheets, Ada and Blackwell RTX architecture white papers; bf16 of GeForce cards with float32
accumulation."""
PRODUCTS = {"qkv": (6144, 2048), "attention out": (2048, 2048), "gate+up": (11264, 2048), "MLP out": (2048, 5632)}
"""Outputs and inputs of the launches of one layer of Ouro 1.4B."""
ROWS = (1, 16, 512, 4096)
TENSOR_FLOAT32 = 3
"""Tensor-core products (at half the rate of bfloat16) per float32 product of a transform."""


@dataclass(frozen=True)
class Stream:
    """The work of a kernel other than a product for one token.

    Args:
        read: bfloat16 numbers that are read.
        quantized: numbers that are written as integers, with scales.
        bits, group: bits and group size of these; None as group means that of the scheme.
        sides: sides of the factors of a transform; `quantized` numbers go through both.
        plain: bfloat16 numbers that are written.
        cached: tokens of a cache that are read, `plain` numbers each for keys and for values.
        operations: operations in float32.
        most: most rows that the kernel is for.
    """

    read: int
    quantized: int = 0
    bits: int | None = None
    group: int | None = None
    sides: tuple[int, int] | None = None
    plain: int = 0
    cached: int = 0
    operations: int = 0
    most: int = 1 << 30


STREAMS = {
    "norm, transform, quantize": Stream(2048, 2048, sides=(32, 64)),
    "SwiGLU, transform, quantize": Stream(2 * 5632, 5632, sides=(64, 88)),
    "adapter of rank 8": Stream(2048, plain=2048, operations=2048 * (6 + 4 * 8)),
    "cache write, 8 bits": Stream(2 * 2048, 2 * 2048, bits=8, group=128),
    "attention, 2,048 tokens in 8 bits": Stream(2048, bits=8, group=128, plain=2048, cached=2048, most=16),
}
"""The other launches of a layer of Ouro 1.4B; every row of attention has its own cache."""


@dataclass(frozen=True)
class Estimate:
    """A lower bound for the time of a launch, and for that of the same product in bfloat16; in microseconds."""

    product: str
    rows: int
    device: str
    microseconds: float
    bound_by: str
    bf16_microseconds: float


def estimate(product: str, rows: int, device: Device, activation_bits: int = 4, group_size: int = 32) -> Estimate:
    """The roofline of one product with 4-bit weights and bfloat16 results; -1 is one group for a whole row."""
    outputs, inputs = PRODUCTS[product]
    groups = 1 if group_size == -1 else inputs // group_size
    read = outputs * (inputs / 2 + 4 * groups) + rows * (inputs * activation_bits / 8 + 4 * groups)
    operations = 2 * rows * outputs * inputs
    times = {
        "memory": (read + 2 * rows * outputs) / (device.bandwidth * 1e3),
        "tensor cores": operations / (device.int8 * 1e6),
        # A rate in operations counts multiply-adds twice; every instruction here replaces one.
        "float32": SCALING * rows * outputs * groups / (device.fp32 / 2 * 1e6),
    }
    bound = max(times, key=times.__getitem__)
    bytes_bf16 = 2 * (outputs * inputs + rows * (inputs + outputs))
    bf16 = max(bytes_bf16 / (device.bandwidth * 1e3), operations / (device.bf16 * 1e6))
    return Estimate(product, rows, device.name, times[bound], bound, bf16)


def estimate_stream(name: str, rows: int, device: Device, activation_bits: int = 4, group_size: int = 32) -> Estimate:
    """The roofline of a kernel other than a product; in bfloat16 without quantization, transform and adapter."""
    stream = STREAMS[name]
    bits, group = stream.bits or activation_bits, stream.group or group_size
    code = bits / 8 + (2 if stream.bits else 4) / group  # scales of a cache have its type, others float32
    stored = stream.quantized + 2 * stream.cached * stream.plain
    sides = stream.sides or (0, 0)
    moved = rows * (2 * stream.read + stored * code + 2 * stream.plain) + 4 * (sides[0] ** 2 + sides[1] ** 2)
    attention = 4 * rows * stream.cached * stream.plain
    transform = 2 * TENSOR_FLOAT32 * rows * stream.quantized * sum(sides)
    times = {
        "memory": moved / (device.bandwidth * 1e3),
        "tensor cores": (attention / device.bf16 + transform / (device.bf16 / 2)) / 1e6,
        "float32": rows * stream.operations / (device.fp32 * 1e6),
    }
    bound = max(times, key=times.__getitem__)
    bf16 = max(
        rows * 2 * (stream.read + stored + stream.plain) / (device.bandwidth * 1e3), attention / device.bf16 / 1e6
    )
    return Estimate(name, rows, device.name, times[bound], bound, bf16)


def estimates(group_size: int = 32) -> list[Estimate]:
    """Estimates of every kernel and number of rows on every device."""
    products = [(estimate, name, ROWS) for name in PRODUCTS]
    streams = [(estimate_stream, name, [n for n in ROWS if n <= stream.most]) for name, stream in STREAMS.items()]
    return [
        bound(name, rows, device, group_size=group_size)
        for bound, name, numbers in [*products, *streams]
        for rows in numbers
        for device in DEVICES
    ]


def static_report(
    architectures: Sequence[int] | None = None, grid: bool = False, kernels: str = "", group_size: int = 32
) -> Report:
    """Compiles the kernels ahead of time and reports what they need.

    Args:
        architectures: compute capabilities times ten; all that are supported by default.
        grid: whether to compile every tile of the tuning grid instead of the defaults; takes many minutes.
        kernels: only kernels whose name contains this.
        group_size: group size of products and quantization, one of `GROUP_SIZES`.

    Raises:
        LoopQError: an architecture or a group size is unknown, or Triton interprets kernels in this process.
    """
    from loopq_compile.backends.triton import ahead

    if group_size not in GROUP_SIZES:
        sizes = ", ".join(map(str, GROUP_SIZES))
        raise LoopQError(f"Kernels have groups of {sizes}, which are single steps along k; got {group_size}.")

    def cases(architecture: int) -> list[ahead.Case]:
        known = (ahead.tuning_cases if grid else ahead.default_cases)(group_size, architecture)
        return [case for case in known if kernels in case.name]

    named = {number: {case.name: case for case in cases(number)} for number in architectures or ahead.ARCHITECTURES}
    found = [
        ahead.compile_case(known[name], architecture)
        for name in dict.fromkeys(name for known in named.values() for name in known)
        for architecture, known in named.items()
        if name in known
    ]
    failed = sum(bool(compiled.problems) for compiled in found)
    return Report(
        "kernels",
        "Triton kernels, compiled without a GPU",
        COLUMNS,
        list(_rows(found)),
        {"compiled": [_plain(compiled) for compiled in found], "failed": failed},
        text_columns=1,
        notes=[f"{len(found)} kernels compiled, {failed} must not ship. Nothing here ran on a GPU."],
    )


def estimate_report(group_size: int = 32) -> Report:
    """The roofline estimates as a table."""
    found = estimates(group_size)
    rows = [
        (
            x.product,
            str(x.rows),
            x.device,
            f"{x.microseconds:.2f}",
            x.bound_by,
            f"{x.bf16_microseconds / x.microseconds:.1f}",
        )
        for x in found
    ]
    return Report(
        "kernels-estimate",
        f"ESTIMATE from data sheets, w4a4 kernels of Ouro 1.4B in groups of {group_size}: not measured",
        ESTIMATE_COLUMNS,
        rows,
        {"estimate": True, "group_size": group_size, "rows": [asdict(x) for x in found]},
        text_columns=1,
        notes=[
            "Lower bounds from peak rates of data sheets; 'times bf16' compares with the same bound for bfloat16: the "
            "same product, or the same norm, activation, cache or attention without quantization and transform."
        ],
    )


def _rows(found: Sequence[Compiled]) -> Iterator[Sequence[str]]:
    for x in found:
        instruction = x.instructions[0] if x.instructions else ""
        numbers = (str(x.registers), str(x.spilled), f"{x.shared / 1024:.1f}")
        yield (x.name, str(x.architecture), *numbers, _short(instruction), "; ".join(x.problems) or "ok")


def _short(instruction: str) -> str:
    return instruction.replace(".sync.aligned", "").replace(".row.col.satfinite", "").replace(".row.col", "")


def _plain(compiled: Compiled) -> dict[str, Any]:
    return asdict(compiled) | {"problems": compiled.problems}
