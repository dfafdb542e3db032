"""Every kernel compiled for every architecture, without a GPU."""

import os
import re
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import triton

from loopq_compile.backends.triton import ahead
from loopq_compile.backends.triton.cubin import needs, tensor_core_instructions
from loopq_compile.errors import InternalError, LoopQError

CASES = {case.name: case for case in ahead.default_cases()}


@pytest.mark.parametrize("name", CASES)
def test_compiles_without_spills_for_every_architecture(name):
    for architecture in ahead.ARCHITECTURES:  # each with its own tiles
        case = next(case for case in ahead.default_cases(32, architecture) if case.name == name)
        found = ahead.compile_case(case, architecture)
        assert found.problems == [], f"{name} sm_{architecture}"
        assert 16 <= found.registers <= 255


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "fp32" in case.types.values()])
def test_scalars_may_be_float64(name):
    """`torch.compile` passes Python's numbers this way. Arithmetic stays in float32."""
    case = CASES[name]
    wide = replace(case, types={key: "fp64" if kind == "fp32" else kind for key, kind in case.types.items()})
    found, expected = (ahead.compile_case(each, 90) for each in (wide, case))
    assert found.problems == [] and abs(found.registers - expected.registers) <= 8
    ptx = ahead.compile_binary(wide, 90).asm["ptx"]
    assert not re.search(r"\b(add|mul|fma|div|max|setp\.\w+)(\.\w+)*\.f64\b", ptx)


@pytest.mark.parametrize("factors", [(200, 8), (84, 16), (16, 256), (256, 32)], ids=str)
def test_transforms_with_long_sides(factors):
    """Sides whose tiles are padded to 128 and 256, as in Hadamard transforms of GPT-2 XL."""
    for architecture in (86, 100, 120):
        case = ahead.quantize_case("long", factors[0] * factors[1], factors, norm="rms")
        assert ahead.compile_case(case, architecture).problems == []


@pytest.mark.nightly
@pytest.mark.parametrize("architecture", ahead.ARCHITECTURES)
def test_every_tile_that_tuning_tries_compiles_without_spills(architecture):
    cases = ahead.tuning_cases(32, architecture)
    assert len(cases) >= 56
    found = [ahead.compile_case(case, architecture) for case in cases]
    assert {compiled.name: compiled.problems for compiled in found if compiled.problems} == {}


@pytest.mark.parametrize("group_size", [64, 128])
def test_products_of_wide_groups(group_size):
    """In the tiles that run where nothing was tuned; `make nightly` takes all architectures for each."""
    for architecture in (
        ahead.ARCHITECTURES if "LOOPQ_CASES" in os.environ else ahead.ARCHITECTURES[group_size // 64 - 1 :: 2]
    ):
        for case in ahead.default_cases(group_size, architecture):
            if case.kernel is ahead.linear_kernel:
                assert ahead.compile_case(case, architecture).problems == [], f"{case.name} sm_{architecture}"


def test_a_tile_that_does_not_fit_is_reported():
    """128 x 128 outputs in four warps: more sums than registers."""
    tile = ahead.Tile(128, 128, 4, 3)
    found = ahead.compile_case(ahead.linear_case("too large", tile), 86)
    assert found.spilled > 0 and "spills" in found.problems[0]
    assert tile not in ahead.tuning_grid(False)


def test_numbers_agree_with_the_assembler(tmp_path):
    case = ahead.linear_case("too large", ahead.Tile(128, 128, 4, 3))
    binary = ahead.compile_binary(case, 86)
    (tmp_path / "kernel.ptx").write_text(binary.asm["ptx"])
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    command = [ptxas, "-v", "--gpu-name=sm_86", "kernel.ptx", "-o", "kernel.cubin"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stderr
    found = needs((tmp_path / "kernel.cubin").read_bytes())
    assert f"Used {found.registers} registers" in said
    assert f"{found.stack} bytes stack frame" in said and found.stack > 0


def test_the_loop_and_the_rows_are_arguments():
    """One kernel serves all loops and lengths: neither is a constant of any case."""
    for case in CASES.values():
        for argument in ("loop", "row", "rows", "weight_rows", "table_rows", "factor_rows", "total", "count"):
            assert argument not in case.constants
            if argument in case.kernel.arg_names:
                assert case.types[argument] == "i32"
                assert argument in case.kernel.do_not_specialize


def test_instructions_are_read_from_ptx():
    ptx = "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 {..};\n@%p1 tcgen05.mma.cta_group::1.kind::i8 [%r1];\n"
    assert tensor_core_instructions(ptx + ptx) == [
        "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8",
        "tcgen05.mma.cta_group::1.kind::i8",
    ]


def test_refusals():
    with pytest.raises(LoopQError, match="sm_70 is not supported"):
        ahead.compile_case(ahead.adapter_case(), 70)
    with pytest.raises(InternalError, match="ELF"):
        needs(b"MZ" + bytes(64))
    with pytest.raises(InternalError, match="registers"):
        needs(_elf_without_records())


def _elf_without_records():
    """An ELF file with one section, the table of names."""
    header = b"\x7fELF\x02\x01" + bytes(0x28 - 6) + struct.pack("<Q", 80) + bytes(10) + struct.pack("<HHH", 64, 1, 0)
    return (header + bytes(80 - len(header))) + struct.pack("<IIQQQQIIQQ", 0, 3, 0, 0, 70, 8, 0, 0, 1, 0)
