"""Finds the kernels that a lowered program launches, without running it, as `Case`s that `ahead` compiles.

The fused graph runs on fake tensors, and the operators pass their launches to a recorder. How Triton's own launcher
would treat each argument (a constant, a number that is a multiple of 16, an aligned pointer) is decided here by the
same rules; a test checks that both give the same cache keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from loopq_compile.backends.triton import operators
from loopq_compile.backends.triton.ahead import Case
from loopq_compile.backends.triton.configurations import DECODE_ROWS, MIDDLE_ROWS
from loopq_compile.errors import LoopQError
from loopq_compile.graph.signature import LOOPS_AXIS, PAST, Signature
from loopq_compile.graph.state import get_state
from loopq_compile.passes.cache.fix_cache import has_position

ROWS = (1, DECODE_ROWS, MIDDLE_ROWS, MIDDLE_ROWS + 1)
"""Numbers of tokens that together reach every tile that a launch may choose."""
_PAST = 16
_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int64: "i64",
}
_ALIGNMENT, _LARGEST_INT32 = 16, (1 << 31) - 1


def launches(graph_module: fx.GraphModule, architecture: int | None = None, rows: Sequence[int] = ROWS) -> list[Case]:
    """The kernels of a graph of `loopq_triton::` operators, each once.

    Args:
        graph_module: the graph with its compiler state.
        architecture: the architecture whose tiles are used; None for the defaults.
        rows: numbers of tokens to try.

    Raises:
        LoopQError: the graph needs the values of a tensor, which fake ones do not have, or kernels are interpreted.
    """
    if operators.INTERPRETED:
        raise LoopQError("TRITON_INTERPRET=1 is set: kernels run on the CPU and are not compiled. Unset it.")
    found: dict[str, Case] = {}
    signature = get_state(graph_module).signature
    for count in rows:
        with recording(lambda case: found.setdefault(repr(case), case), architecture):
            run_fake(graph_module, signature, count, get_state(graph_module).loops.count)
    return list(found.values())


def run_fake(graph_module: fx.GraphModule, signature: Signature, count: int, loops: int = 1) -> None:
    """Runs a graph on `count` tokens without values; caches in one tensor have `loops` loops.

    A step with fixed shapes (pass `fix-cache`) has a cache and a mask of one length, and a position.

    Raises:
        LoopQError: the graph asks for values: a CUDA graph could not capture it either.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        fixed = isinstance(graph_module, fx.GraphModule) and has_position(graph_module)
        shapes = [_shape(spec.shape, count, loops, fixed) for spec in signature.inputs]
        inputs = [torch.empty(shape, dtype=spec.dtype) for shape, spec in zip(shapes, signature.inputs, strict=True)]
        inputs += [torch.empty(1, dtype=torch.int64)] if fixed else []
        try:
            graph_module(*inputs)
        except torch._subclasses.fake_tensor.DynamicOutputShapeException as error:
            raise LoopQError(f"The program has a result whose shape depends on values: {error}.") from error
        except torch._subclasses.fake_tensor.DataDependentOutputException as error:
            raise LoopQError(f"The program reads a value on the host, which waits for the GPU: {error}.") from error


def _shape(spec: Sequence[int | str], count: int, loops: int, fixed: bool) -> list[int]:
    sizes = {"batch": 1, "sequence": count, PAST: _PAST, LOOPS_AXIS: loops}
    if fixed:
        spec = [PAST if isinstance(size, str) and PAST in size.split(" + ") else size for size in spec]
    return [
        size if isinstance(size, int) else sum(sizes.get(part, count) for part in size.split(" + ")) for size in spec
    ]


@contextmanager
def recording(keep: Callable[[Case], Any], architecture: int | None = None) -> Iterator[None]:
    """While it is open, launches are not made but passed to `keep`, as they would be on `architecture`."""
    before = operators.launcher, operators.architecture_of
    operators.launcher = lambda kernel: _Recorder(kernel, keep)  # type: ignore[assignment]
    operators.architecture_of = lambda device: architecture  # type: ignore[assignment]
    try:
        yield
    finally:
        operators.launcher, operators.architecture_of = before  # type: ignore[assignment]


class _Recorder:
    """Replaces a kernel: `recorder[grid](*args, **constants)` records the launch as a case."""

    def __init__(self, kernel: Any, keep: Callable[[Case], Any]) -> None:
        self.kernel, self.keep = kernel, keep

    def __getitem__(self, grid: Any) -> Any:
        return self

    def __call__(self, *args: Any, num_warps: int, num_stages: int = 3, **constants: Any) -> None:
        types: dict[str, str] = {}
        aligned = []
        for parameter, value in zip(self.kernel.params, args, strict=False):
            kind, is_aligned = _specialized(value, parameter.do_not_specialize)
            is_aligned = is_aligned and not parameter.do_not_specialize_on_alignment
            if kind is None:
                constants[parameter.name] = value
            else:
                types[parameter.name] = kind
            if is_aligned:
                aligned.append(parameter.name)
        name = self.kernel.fn.__name__
        self.keep(Case(name, self.kernel, types, constants, num_warps, num_stages, tuple(aligned)))


def _specialized(value: Any, as_it_is: bool) -> tuple[str | None, bool]:
    """The type of an argument, None for a constant of the kernel, and whether it is a multiple of 16."""
    if value is None:
        return None, False
    if isinstance(value, Tensor):
        # Allocations begin at multiples of 512, so only a view's offset in its allocation counts.
        return f"*{_TYPES[value.dtype]}", int(value.storage_offset()) * value.element_size() % _ALIGNMENT == 0
    if isinstance(value, float):
        return "fp32", False
    kind = "i32" if -_LARGEST_INT32 <= value <= _LARGEST_INT32 else "i64"
    if as_it_is:
        return kind, False
    return (None, False) if value == 1 else (kind, value % _ALIGNMENT == 0)
