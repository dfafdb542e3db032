"""Runs elementwise functions as single loops, compiled by `torch.compile`, during calibration.

Straight-through quantization is a dozen elementwise steps, each of which reads and writes the whole tensor. Unless they
are fused, calibration spends most of its time there. Compiling takes seconds, so only long calibrations ask for it
(`fusing`). Without a C++ compiler, the plain functions run.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.utils.checkpoint

Function = TypeVar("Function", bound=Callable[..., Any])
_KERNELS = 64
"""Most variants of one function (types, broadcasting, sizes of groups); beyond them the plain function runs."""
_STOPPED: Any = getattr(torch.utils.checkpoint, "_StopRecomputationError", ())
"""Leaves a function early when recomputation has all that the backward pass needs."""
_wanted = False
_broken = False


@contextlib.contextmanager
def fusing(wanted: bool = True) -> Iterator[None]:
    """While it is open, functions marked as `fused` run compiled."""
    global _wanted
    before, _wanted = _wanted, wanted
    try:
        yield
    finally:
        _wanted = before


def is_fusing() -> bool:
    """Whether functions marked as `fused` run compiled now."""
    return _wanted and not _broken


def fused(function: Function) -> Function:
    """`function`, which runs compiled inside `fusing` if possible.

    Sizes that differ between calls are compiled as unknowns; those that never change, as constants.
    """
    compiled = torch.compile(function)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        global _broken
        if not is_fusing():
            return function(*args)
        try:
            _tidy_at_exit()
            with torch._dynamo.config.patch(recompile_limit=_KERNELS):
                return compiled(*args)
        except _STOPPED:
            raise
        except Exception as error:  # the compiler or its toolchain may raise anything
            _broken = True
            logging.getLogger(__name__).debug("torch.compile failed", exc_info=error)
            warnings.warn(f"Calibration runs without fused kernels, which is slower: {error}", stacklevel=2)
            return function(*args)

    return call  # type: ignore[return-value]


@functools.cache
def _tidy_at_exit() -> None:
    """Makes the compiler release its records before the interpreter shuts down, which otherwise prints errors, and
    hides its message that a machine has no GPU."""
    atexit.register(torch.compiler.reset)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
