"""`bench kernels`: what the Triton kernels need of a GPU, compiled without one, and an estimate of their speed.

The estimate is a roofline: the time of a launch is at least what memory, tensor cores, and ordinary float32 arithmetic
each take alone, at the rates of the data sheet; the largest of the three is the bound. Real kernels are slower. For the
matrix product, the float32 part is what scaling costs: for every output and group a subtraction (integer to float), a
product of scales, and a multiply-add.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from loopq_compile.bench.report import Report
from loopq_compile.errors import LoopQError

if TYPE_CHECKING:
    from loopq_compile.backends.triton.ahead import Compiled

COLUMNS = ("kernel", "sm", "registers", "spilled", "shared KiB", "tensor-core instruction", "verdict")
ESTIMATE_COLUMNS = ("product", "rows", "device", "µs at least", "bound by", "times bf16")
GROUP_SIZES = (32, 64, 128)
"""That kernels have: a group is one step along k."""
SCALING = 3
"""Float32 instructions for an output and group."""


@dataclass(frozen=True)
class Device:
    """Peak rates from a data sheet, dense (without sparsity).

    Args:
        name: of the product.
        bandwidth: of memory, in GB/s.
        int8, bf16: of tensor cores, in 10^12 operations per second, a multiply-add counting as two.
        fp32: outside tensor cores, in the same unit.
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


@dataclass(frozen=True)
class Estimate:
    """A lower bound for the time of a launch, and that of the same product in bfloat16; microseconds."""

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
        # A rate in operations counts multiply-adds twice; every instruction here takes the place of one.
        "float32": SCALING * rows * outputs * groups / (device.fp32 / 2 * 1e6),
    }
    bound = max(times, key=times.__getitem__)
    bytes_bf16 = 2 * (outputs * inputs + rows * (inputs + outputs))
    bf16 = max(bytes_bf16 / (device.bandwidth * 1e3), operations / (device.bf16 * 1e6))
    return Estimate(product, rows, device.name, times[bound], bound, bf16)


def estimates(group_size: int = 32) -> list[Estimate]:
    """Every product and number of rows on every device."""
    return [
        estimate(product, rows, device, group_size=group_size)
        for product in PRODUCTS
        for rows in ROWS
        for device in DEVICES
    ]


def static_report(
    architectures: Sequence[int] | None = None, grid: bool = False, kernels: str = "", group_size: int = 32
) -> Report:
    """Compiles the kernels ahead of time and tells what they need.

    Args:
        architectures: compute capabilities times ten; all that are supported by default.
        grid: every tile of the tuning grid in place of the defaults; takes many minutes.
        kernels: only those whose name contains this.
        group_size: of products and quantization, one of `GROUP_SIZES`.

    Raises:
        LoopQError: an architecture or a group size is unknown, or Triton interprets kernels in this process.
    """
    from loopq_compile.backends.triton import ahead

    if group_size not in GROUP_SIZES:
        sizes = ", ".join(map(str, GROUP_SIZES))
        raise LoopQError(f"Kernels have groups of {sizes}, which are single steps along k; got {group_size}.")

    def cases(architecture: int) -> list[ahead.Case]:
        known = ahead.tuning_cases(group_size) if grid else ahead.default_cases(group_size, architecture)
        return [case for case in known if kernels in case.name]

    found = list(ahead.compile_all(cases, architectures or ahead.ARCHITECTURES))
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
        f"ESTIMATE from data sheets, w4a4 products of Ouro 1.4B in groups of {group_size}: not measured",
        ESTIMATE_COLUMNS,
        rows,
        {"estimate": True, "group_size": group_size, "rows": [asdict(x) for x in found]},
        text_columns=1,
        notes=["Lower bounds from peak rates of data sheets; 'times bf16' compares with the same bound for bfloat16."],
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
