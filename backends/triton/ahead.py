"""Compiles the kernels without a GPU, for every supported architecture, and reports what they need.

A `Case` is a kernel with all of its constants, as the operators launch it. Run-time arguments of the operators (rows,
strides, the loop) stay run-time arguments here, with the divisibility that the tensors of a model have.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, replace
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.compiler.compiler import get_cache_invalidating_env_vars
from triton.runtime.cache import get_cache_key

from loopq_compile.backends.triton.configurations import Tile, row_warps, tile_of_kind, tuning_grid
from loopq_compile.backends.triton.cubin import needs, tensor_core_instructions
from loopq_compile.backends.triton.kernels.adapter import adapter_kernel
from loopq_compile.backends.triton.kernels.cache import attention_kernel, join_parts_kernel, write_cache_kernel
from loopq_compile.backends.triton.kernels.linear import linear_kernel, sum_parts_kernel
from loopq_compile.backends.triton.kernels.quantize import quantize_kernel
from loopq_compile.backends.triton.operators import (
    ADAPTER_WARPS,
    ATTENTION_STAGES,
    CACHE_WARPS,
    INTERPRETED,
    SUM_COLUMNS,
    adapter_constants,
    attention_constants,
    attention_warps,
    row_constants,
    write_constants,
)
from loopq_compile.errors import LoopQError

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
"""Compute capabilities: A100, RTX 30, RTX 40, H100, B200, RTX 50."""
SHARED_LIMITS = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB of shared memory that one program may have (CUDA C programming guide, table of compute capabilities)."""


@dataclass(frozen=True)
class Case:
    """A kernel as the operators launch it.

    Args:
        name: for people and tables.
        kernel: the `triton.jit` function.
        types: types of run-time arguments, in Triton's notation.
        constants: compile-time arguments; arguments that are neither here nor in `types` are None.
        warps, stages: as in a launch of the kernel.
        aligned: pointers and run-time numbers that are multiples of 16.
        products: "s8" if the kernel multiplies int8 on tensor cores, "tf32" or "bf16" for other products, else "".
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int
    aligned: tuple[str, ...] = ()
    products: str = ""


@dataclass(frozen=True)
class Compiled:
    """The result of compiling a case for one architecture.

    Args:
        name, architecture: name of the case, and the compute capability times ten.
        registers: registers of every thread; at most 255.
        spilled: bytes of every thread that did not fit into registers. More than 0 is a failure.
        shared: bytes of shared memory of a program.
        instructions: tensor-core instructions in the PTX.
        products: what the case should multiply on tensor cores.
        warps: warps of a program.
        failure: the message of Triton's compiler if it failed; the numbers are then 0.
    """

    name: str
    architecture: int
    registers: int
    spilled: int
    shared: int
    instructions: tuple[str, ...]
    products: str
    warps: int
    failure: str = ""

    @property
    def problems(self) -> list[str]:
        """Why this kernel must not ship; empty if it may."""
        if self.failure:
            return [f"does not compile: {self.failure}"]
        found = []
        if self.spilled:
            found.append(f"spills {self.spilled} bytes")
        if self.shared > SHARED_LIMITS[self.architecture] * 1024:
            found.append(f"{self.shared} bytes of shared memory, {SHARED_LIMITS[self.architecture]} KiB are there")
        kinds = {"s8": (".s8", "kind::i8"), "tf32": (".tf32", "kind::tf32"), "bf16": (".bf16", "kind::f16")}.get(
            self.products, ()
        )
        if kinds and not any(kind in name for kind in kinds for name in self.instructions):
            found.append(f"no {self.products} tensor-core instruction")
        return found


def compile_case(case: Case, architecture: int) -> Compiled:
    """Compiles `case` for one architecture and reads what it needs.

    Triton's compiler cannot compile every tile on every architecture (for some, 3.8.0 stops on sm_100 with "Illegal
    shared layout"); that is a result, too.

    Raises:
        LoopQError: as in `compile_binary`.
    """
    try:
        binary = compile_binary(case, architecture)
    except RuntimeError as error:
        return Compiled(case.name, architecture, 0, 0, 0, (), case.products, case.warps, str(error).splitlines()[0])
    found = needs(binary.asm["cubin"])
    return Compiled(
        case.name,
        architecture,
        found.registers,
        found.stack,
        binary.metadata.shared,
        tuple(tensor_core_instructions(binary.asm["ptx"])),
        case.products,
        case.warps,
    )


def compile_binary(case: Case, architecture: int) -> Any:
    """Compiles `case` to PTX and a cubin for one architecture; Triton caches the result.

    Raises:
        LoopQError: the architecture is none of `ARCHITECTURES`, or this process interprets kernels.
    """
    check_architecture(architecture)
    options = {"num_warps": case.warps, "num_stages": case.stages}
    return triton.compile(_source(case), target=_target(architecture), options=options)


def cache_key(case: Case, architecture: int) -> str:
    """The name of the entry in Triton's cache under which a launch looks for the compiled case.

    Raises:
        LoopQError: as `compile_binary`.
    """
    check_architecture(architecture)
    backend = make_backend(_target(architecture))
    options = backend.parse_options({"num_warps": case.warps, "num_stages": case.stages})
    key = get_cache_key(_source(case), backend, options, get_cache_invalidating_env_vars())
    return hashlib.sha256(key.encode()).hexdigest()


def check_architecture(architecture: int) -> None:
    """Refuses architectures that cannot be compiled for.

    Raises:
        LoopQError: the architecture is none of `ARCHITECTURES`, or this process interprets kernels.
    """
    if INTERPRETED:
        raise LoopQError("TRITON_INTERPRET=1 is set: kernels run on the CPU and are not compiled. Unset it.")
    if architecture not in ARCHITECTURES:
        raise LoopQError(f"sm_{architecture} is not supported; there are {', '.join(map(str, ARCHITECTURES))}.")


def _target(architecture: int) -> GPUTarget:
    return GPUTarget("cuda", architecture, 32)


def _source(case: Case) -> ASTSource:
    """What Triton compiles, written as its launcher writes it, since that form is part of the cache key."""
    names = case.kernel.arg_names
    signature = {name: case.types.get(name, "constexpr") for name in names}
    attributes = {
        (parameter.num,): [["tt.divisibility", 16]] if parameter.name in case.aligned else []
        for parameter in case.kernel.params
        if signature[parameter.name] == "constexpr" or _is_specialized(parameter, signature[parameter.name])
    }
    given = {(i,): case.constants.get(name) for i, name in enumerate(names) if name not in case.types}
    return ASTSource(case.kernel, signature, given, attributes)


def _is_specialized(parameter: Any, kind: str) -> bool:
    """Whether a launch specializes on the value of a run-time argument."""
    return not parameter.do_not_specialize and (kind.startswith("*") or kind in ("i32", "i64"))


def _case(
    name: str,
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    warps: int,
    stages: int,
    aligned: tuple[str, ...],
    products: str = "",
) -> Case:
    """A case whose pointers are all aligned, as whole tensors are."""
    pointers = (name for name, kind in types.items() if kind.startswith("*"))
    return Case(name, kernel, types, constants, warps, stages, (*pointers, *aligned), products)


def linear_case(name: str, tile: Tile, packed_codes: bool = True, group_size: int = 32) -> Case:
    """The matrix product of a layer with 2048 inputs, with bias, in bfloat16."""
    types = {"codes": "*u8" if packed_codes else "*i8", "scales": "*fp32", "weight": "*u8", "weight_scales": "*fp32"}
    types |= {"out": "*fp32"} if tile.split > 1 else {"bias": "*bf16", "out": "*bf16"}
    types |= dict.fromkeys(("rows", "columns", "row", "weight_rows"), "i32")
    constants = {
        "GROUPS": 2048 // group_size,
        "GROUP": group_size,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "SPLIT": tile.split,
        "STAGES": tile.stages,
    }
    label = f"{name} {'w4a4' if packed_codes else 'w4a8'}"
    return _case(label, linear_kernel, types, constants, tile.warps, tile.stages, ("columns",), "s8")


def quantize_case(
    name: str,
    width: int,
    factors: tuple[int, int] | None,
    *,
    up: bool = False,
    activation: str = "",
    norm: str = "",
    static: bool = False,
    bits: int = 4,
    group_size: int = 32,
) -> Case:
    """Quantization of tokens in bfloat16 with a diagonal and, if there are factors, a transform in float32."""
    work = tl.float32 if factors else tl.bfloat16
    constants = row_constants(width, group_size, width // group_size, factors, bits, 0 if static else -8, work)
    constants |= {"ACTIVATION": activation, "NORM": norm}
    types = {"x": "*bf16", "codes": "*u8" if bits <= 4 else "*i8"}
    types |= dict.fromkeys(("table", "scales"), "*fp32") | {"eps": "fp32", "smallest": "fp32"}
    types |= {"up": "*bf16"} if up else {}
    types |= {"gain": "*bf16"} if norm else {}
    types |= {"shift": "*bf16"} if norm == "layer" else {}
    types |= dict.fromkeys(("diagonal", "left", "right"), "*fp32") if factors else {}
    if constants["D2"] != constants["P2"] or constants["STEP"]:
        types["scratch"] = "*fp32"
    types |= dict.fromkeys(("x_stride", "up_stride", "loop", "diagonal_rows", "factor_rows", "table_rows"), "i32")
    label = f"{name} {'static' if static else 'dynamic'} a{bits}"
    warps = row_warps(constants["P1"] * constants["P2"])
    strides = ("x_stride", "up_stride")
    return _case(label, quantize_kernel, types, constants, warps, 3, strides, "tf32" if factors else "")


def adapter_case(name: str = "adapter", width: int = 2048, rank: int = 8) -> Case:
    """The transition adapter in bfloat16 with float32 tables."""
    types = dict.fromkeys(("gate", "gain", "shift", "mix", "down", "up"), "*fp32") | {"u": "*bf16", "out": "*bf16"}
    types |= dict.fromkeys(("u_stride", "loop", "table_rows"), "i32") | {"eps": "fp32"}
    return _case(name, adapter_kernel, types, adapter_constants(width, rank), ADAPTER_WARPS, 3, ("u_stride",))


def write_case(bits: int, size: int = 128, group_size: int = 32) -> Case:
    """Quantization of keys or values in bfloat16 on their way into a cache, with a scale for `group_size` channels."""
    types = {"x": "*bf16", "codes": "*u8" if bits == 4 else "*i8", "scales": "*bf16", "smallest": "fp32"}
    types |= dict.fromkeys(("x_batch", "x_head", "x_token", "count", "heads", "new"), "i32")
    constants = write_constants(size, group_size, bits)
    return Case(f"cache write kv{bits}", write_cache_kernel, types, constants, CACHE_WARPS, 3)


def attention_case(bits: int, size: int = 128, group_size: int = 32, *, limited: bool = False) -> Case:
    """Attention in bfloat16 on a cache of integers, with a scale for `group_size` channels of a head.

    Args:
        bits, size, group_size: of the cache.
        limited: whether the cache has room for more columns than are read.
    """
    types = dict.fromkeys(("query", "key_scales", "value_scales", "mask"), "*bf16")
    types |= dict.fromkeys(("keys", "values"), "*u8" if bits == 4 else "*i8")
    types |= dict.fromkeys(("sums", "weights"), "*fp32") | {"scale": "fp32"}
    types |= dict.fromkeys((f"query_{axis}" for axis in ("batch", "head", "row")), "i32")
    types |= dict.fromkeys((f"mask_{axis}" for axis in ("batch", "head", "row", "column")), "i32")
    types |= dict.fromkeys(("heads", "repeat", "rows", "total"), "i32")
    groups = size // group_size
    constants = attention_constants(size, groups, size, groups, bits, element_size=2)
    if limited:
        types["last"] = "*i64"
    else:
        constants["last"] = None
    aligned = ("sums", "weights")
    name, warps = f"attention kv{bits} {size}{' limited' if limited else ''}", attention_warps(constants)
    return Case(name, attention_kernel, types, constants, warps, ATTENTION_STAGES, aligned, "bf16")


def join_case(size: int = 128) -> Case:
    """The kernel that joins the parts of attention."""
    types = {"sums": "*fp32", "weights": "*fp32", "out": "*bf16"}
    types |= dict.fromkeys(("parts", "heads", "repeat", "rows"), "i32")
    return _case("attention join", join_parts_kernel, types, {"SIZE": size, "PADDED": size}, 1, 3, ())


def sum_case(split: int = 4) -> Case:
    """The kernel that adds up the parts of the decode variant."""
    types = {"parts": "*fp32", "bias": "*bf16", "out": "*bf16", "rows": "i32", "columns": "i32"}
    return _case("decode sum", sum_parts_kernel, types, {"SPLIT": split, "COLUMNS": SUM_COLUMNS}, 1, 3, ("columns",))


def default_cases(group_size: int = 32, architecture: int | None = None) -> list[Case]:
    """Every kernel as it runs on an architecture, at the sizes of Ouro 1.4B (width 2048, MLP 5632)."""
    cases = [
        linear_case(kind, replace(tile_of_kind(kind, architecture, group_size), split=split), packed, group_size)
        for kind, split in (("prefill", 1), ("middle", 1), ("decode", 4))
        for packed in (True, False)
    ]
    quantize = functools.partial(quantize_case, group_size=group_size)
    cases += [sum_case(), quantize("quantize", 2048, None), quantize("quantize", 2048, None, static=True, bits=8)]
    cases.append(quantize("norm+transform", 2048, (32, 64), norm="rms"))
    cases.append(quantize("norm+transform", 2048, (32, 64), norm="rms", static=True, bits=8))
    cases.append(quantize("swiglu+transform", 5632, (64, 88), activation="silu", up=True))
    cases.append(quantize("gelu+transform", 4096, (64, 64), activation="gelu"))
    cases.append(quantize("gelu_tanh", 4096, None, activation="gelu_tanh"))
    cases.append(quantize("layer norm+transform", 768, (24, 32), norm="layer"))
    cases += [write_case(8, group_size=128), write_case(4), join_case()]
    for limited in (False, True):
        attention = functools.partial(attention_case, limited=limited)
        cases += [attention(8, group_size=128), attention(4), attention(8, 64, 64), attention(4, 64)]
    return [*cases, adapter_case()]


def tuning_cases(group_size: int = 32, architecture: int | None = None) -> list[Case]:
    """The matrix product in every tile of an architecture's tuning grid."""
    return [
        linear_case(f"{'decode' if decode else 'prefill'} {tile}", tile, packed, group_size)
        for decode in (False, True)
        for tile in tuning_grid(decode, architecture, group_size)
        for packed in (True, False)
    ]
