"""`bench kernels` on a GPU: our products against others, tiles by trial, and tokens per second of a program.

Every result is compared with the definition before it is timed. The timer is an argument, so that everything else is
tested without a GPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from loopq_compile.backends.triton.configurations import KINDS, Table, Tile, forcing, kind_of, table_name, tuning_grid
from loopq_compile.bench.cells import Cells, Values
from loopq_compile.bench.kernels import PRODUCTS, ROWS
from loopq_compile.bench.results import Report
from loopq_compile.errors import LoopQError
from loopq_compile.operators import ops
from loopq_compile.operators.packed import pack_weight

Timer = Callable[[Callable[[], Any]], float]
"""Milliseconds of a function that launches kernels."""
COLUMNS = ("product", "rows", "runs", "µs", "times bf16", "note")
OURS = ("w4a4", "w4a8")
BASELINE = "bfloat16 (cuBLAS)"
_CLOSE = 0.02
"""Allowed difference from the definition, as share of the largest result: results are bfloat16."""


@dataclass(frozen=True)
class Problem:
    """One product, with everything that candidates need.

    Args:
        x: `[rows, inputs]` in bfloat16.
        weight: `[outputs, inputs]` in bfloat16.
        group_size: of the integer candidates.
    """

    x: Tensor
    weight: Tensor
    group_size: int

    def packed(self, activation_bits: int) -> tuple[Any, ...]:
        """Arguments of `packed_linear`."""
        groups = self.x.shape[1] // self.group_size
        table = torch.ones(1, groups, device=self.x.device)
        front: tuple[Any, ...] = (None, "", "", None, None, 0.0, None, None, None)
        numbers = (0, self.group_size, activation_bits, -(1 << (activation_bits - 1)))
        codes, scale = ops.quantize_packed(self.x, *front, table, *numbers)
        scales = ops.dynamic_scale(self.weight.float(), torch.ones(groups, device=self.x.device), self.group_size, -8)
        integers = ops.quantize(self.weight.float(), scales, self.group_size, -8, 7)
        weight, weight_scale = pack_weight(integers, scales, self.group_size, 4)
        return (codes, scale, weight[None], weight_scale[None], None, 0, self.group_size, torch.bfloat16)


@dataclass(frozen=True)
class Candidate:
    """One way to compute a product.

    Args:
        name: name in tables.
        prepare: makes the function to time from a problem.
        refuses: why it cannot run that problem here; "" if it can.
    """

    name: str
    prepare: Callable[[Problem], Callable[[], Any]]
    refuses: Callable[[Problem], str] = lambda problem: ""


def make_problem(product: str, rows: int, group_size: int, device: str) -> Problem:
    """A problem of random numbers with a fixed seed."""
    outputs, inputs = PRODUCTS[product]
    generator = torch.Generator(device=device).manual_seed(0)
    x, weight = (torch.randn(n, inputs, generator=generator, device=device) for n in (rows, outputs))
    return Problem(x.to(torch.bfloat16), (weight / inputs**0.5).to(torch.bfloat16), group_size)


def candidates(product: Callable[..., Tensor] | None = None) -> list[Candidate]:
    """Our kernels, and what they are compared with.

    Args:
        product: what our candidates launch; `loopq_triton::packed_linear` by default.
    """
    baseline = Candidate(BASELINE, lambda problem: lambda: F.linear(problem.x, problem.weight))
    ours = [Candidate(name, _ours(int(name[-1]), product)) for name in OURS]
    return [baseline, *ours, Candidate("torch._int_mm (w8a8)", _int_mm, _int_mm_refuses), _torchao()]


def _ours(bits: int, product: Callable[..., Tensor] | None) -> Callable[[Problem], Callable[[], Any]]:
    def prepare(problem: Problem) -> Callable[[], Any]:
        arguments = problem.packed(bits)
        run = product or _kernel()
        found, expected = run(*arguments).double(), ops.packed_linear(*arguments).double()
        distance = float((found - expected).abs().max() / expected.abs().max())
        if not distance <= _CLOSE:
            raise LoopQError(
                f"The kernel is wrong for w4a{bits} on {list(problem.x.shape)} x {list(problem.weight.shape)}: it "
                f"differs by {distance:.3g} of the largest result. It is not timed; please report this."
            )
        return lambda: run(*arguments)

    return prepare


def _kernel() -> Callable[..., Tensor]:
    from loopq_compile.backends.triton import operators  # noqa: F401  (registers the kernels)

    return torch.ops.loopq_triton.packed_linear.default


def _int_mm(problem: Problem) -> Callable[[], Any]:
    """Only integers: no scales, no rounding of activations."""
    a, b = ((t.float() * 40).round().clamp(-127, 127).to(torch.int8) for t in (problem.x, problem.weight))
    return lambda: torch._int_mm(a, b.t())


def _int_mm_refuses(problem: Problem) -> str:
    return "" if problem.x.shape[0] > 16 else "takes more than 16 rows"


def _torchao() -> Candidate:
    """4-bit weights with bfloat16 activations, torchao's own kernel."""

    def prepare(problem: Problem) -> Callable[[], Any]:
        from torchao.quantization import Int4WeightOnlyConfig, quantize_

        outputs, inputs = problem.weight.shape
        linear = torch.nn.Linear(inputs, outputs, bias=False, device=problem.x.device, dtype=problem.x.dtype)
        linear.weight.data.copy_(problem.weight)
        quantize_(linear, Int4WeightOnlyConfig(group_size=problem.group_size))
        return lambda: linear(problem.x)

    installed = importlib.util.find_spec("torchao") is not None
    return Candidate("torchao w4a16", prepare, lambda problem: "" if installed else "torchao is not installed")


def check_gpu() -> str:
    """The name of the GPU to time on.

    Raises:
        LoopQError: there is none.
    """
    if not torch.cuda.is_available():
        raise LoopQError(
            "Timing kernels needs an NVIDIA GPU, and none was found. `bench kernels --static` compiles them without "
            "one and prints an estimate."
        )
    return torch.cuda.get_device_name()


def architecture() -> int:
    """Compute capability times ten of the GPU to time on."""
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def do_bench(function: Callable[[], Any]) -> float:
    """Triton's own timer: the median of many launches, with the cache emptied in between."""
    from triton.testing import do_bench as measure

    return float(measure(function, return_mode="median"))


def time_products(
    device_name: str,
    cells: Cells,
    *,
    group_size: int = 32,
    rows: Sequence[int] = ROWS,
    products: Sequence[str] = tuple(PRODUCTS),
    runs: Sequence[Candidate] | None = None,
    timer: Timer = do_bench,
    device: str = "cuda",
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Times every candidate on the products of one layer of Ouro 1.4B.

    Args:
        device_name: name of the GPU, part of the cells' keys.
        cells: stores finished measurements.
        group_size: group size of the integer candidates.
        rows, products: which to measure.
        runs: candidates; a candidate that fails is noted and left out.
        timer: returns the milliseconds of a function.
        device: where tensors are.
        say: called with what is being measured.

    Raises:
        LoopQError: one of our kernels gives a wrong result.
    """
    lines: list[Values] = []
    for product in products:
        for count in rows:
            say(f"{product}, {count} rows")
            for run in runs or candidates():
                about = {"gpu": device_name, "torch": torch.__version__, "group_size": group_size}
                about |= {"product": product, "rows": count, "runs": run.name}
                measure = _measuring(run, product, count, group_size, device, timer)
                lines.append(
                    {"product": product, "rows": count, "runs": run.name} | cells.get(run.name, about, measure)
                )
    base = {(x["product"], x["rows"]): x["ms"] for x in lines if x["runs"] == BASELINE}
    return Report(
        "kernels-timed",
        f"Products of one layer of Ouro 1.4B on {device_name}, groups of {group_size}",
        COLUMNS,
        [_line(x, base.get((x["product"], x["rows"]))) for x in lines],
        {"gpu": device_name, "group_size": group_size, "rows": lines},
        text_columns=1,
        notes=[
            "Medians of Triton's do_bench. Rounding of activations is not part of a product: in a program it is one "
            "kernel with the norm or the activation function in front of it."
        ],
    )


def _measuring(
    run: Candidate, product: str, rows: int, group_size: int, device: str, timer: Timer
) -> Callable[[], Values]:
    def measure() -> Values:
        problem = make_problem(product, rows, group_size, device)
        if reason := run.refuses(problem):
            return {"ms": None, "note": reason}
        try:
            return {"ms": timer(run.prepare(problem)), "note": ""}
        except LoopQError:
            raise
        except Exception as error:  # kernels of others: unsupported shapes, missing parts
            return {
                "ms": None,
                "note": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:80],
            }

    return measure


def _line(x: Values, base: float | None) -> tuple[str, ...]:
    time = "" if x["ms"] is None else f"{1e3 * x['ms']:.1f}"
    ratio = f"{base / x['ms']:.2f}" if base and x["ms"] else ""
    return (x["product"], str(x["rows"]), x["runs"], time, ratio, x["note"])


def tune(
    architecture: int,
    *,
    group_size: int = 32,
    timer: Timer = do_bench,
    device: str = "cuda",
    product: Callable[..., Tensor] | None = None,
    tiles: Callable[[bool, int, int], Sequence[Tile]] = tuning_grid,
    say: Callable[[str], None] = lambda text: None,
) -> Table:
    """The fastest tile for every kind of product, by the total time of all products of a layer.

    Tiles that fail (too much shared memory) are left out.

    Raises:
        LoopQError: a kernel gives a wrong result, or no tile runs.
    """
    found: dict[str, Tile] = {}
    for rows in (1, 64, 4096):
        kind = kind_of(rows)
        problems = [make_problem(name, rows, group_size, device) for name in PRODUCTS]
        times: dict[Tile, float] = {}
        for tile in tiles(kind == "decode", architecture, group_size):
            with forcing(tile):
                time = sum(_times(problems, timer, product))
            if time < float("inf"):
                times[tile] = time
                say(f"sm_{architecture} {kind} {tile}: {1e3 * time:.1f} µs")
        if not times:
            raise LoopQError(f"No tile of the tuning grid runs on sm_{architecture} for {kind}.")
        found[kind] = replace(min(times, key=times.__getitem__), split=1)  # the shape decides how far to split
    assert found.keys() == KINDS.keys()
    return {table_name(architecture, group_size): found}


def _times(problems: Sequence[Problem], timer: Timer, product: Callable[..., Tensor] | None) -> Iterator[float]:
    for problem in problems:
        try:
            yield timer(_ours(4, product)(problem))
        except LoopQError:
            raise
        except Exception:  # Triton's errors for what does not fit a multiprocessor have no common class
            yield float("inf")


def time_decoding(
    program: Any,
    *,
    batch: int = 1,
    context: int = 128,
    kv_bits: int | None = None,
    timer: Timer = do_bench,
    fallback: bool = False,
    cuda_graph: bool = True,
) -> Values:
    """Tokens per second of a program that decodes with all loops after `context` tokens.

    Args:
        program: a compiled program with a vocabulary of at least 2.
        batch: sequences at once.
        context: tokens read before; the cache has room for the same number again.
        kv_bits: bits of the cache, 8 or 4; None for floating point, which PyTorch's attention reads.
        timer: returns the milliseconds of a function.
        fallback, cuda_graph: as for `lower` and `TritonExecutable.static_decoder`.

    Returns:
        `ms` of a step, `tokens_per_second`, `batch`, `context`, `kv_bits`.
    """
    run = program.with_cache(last_token=True, kv_bits=kv_bits).lower("triton", fallback=fallback)
    decoder = run.static_decoder(2 * context, cuda_graph=cuda_graph).decoder()
    ids = torch.ones(batch, context, dtype=torch.int64, device=run.device)
    decoder(ids, torch.ones_like(ids))
    new, mask = ids[:, :1], torch.ones(batch, context + 1, dtype=torch.int64, device=run.device)
    ms = timer(lambda: decoder(new, mask))
    about = {"batch": batch, "context": context, "kv_bits": kv_bits}
    return {**about, "ms": ms, "tokens_per_second": 1e3 * batch / ms}


def decoding_report(device_name: str, name: str, lines: Sequence[Values]) -> Report:
    """What `time_decoding` found for several batch sizes."""
    return Report(
        "kernels-decoding",
        f"{name}: decoding with all loops on {device_name}",
        ("cache", "batch", "context", "ms a step", "tokens/s"),
        [
            (
                f"{x['kv_bits']} bits" if x["kv_bits"] else "floating point",
                *(str(x["batch"]), str(x["context"]), f"{x['ms']:.3f}", f"{x['tokens_per_second']:.0f}"),
            )
            for x in lines
        ],
        {"gpu": device_name, "program": name, "rows": list(lines)},
        text_columns=1,
        notes=["One CUDA graph a step, a key-value cache of fixed size."],
    )
