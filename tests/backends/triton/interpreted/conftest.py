"""Lets Triton's interpreter round to bfloat16 as GPUs do (`cvt.rn`): by itself it truncates. Also lets it
multiply matrices of bfloat16, which it holds as uint16 and would multiply as such."""

import os

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter


@pytest.fixture(autouse=True)
def round_to_bfloat16(monkeypatch):
    cast = interpreter.InterpreterBuilder.cast_impl

    def rounding_cast(self, source, kind):
        if source.dtype.scalar == tl.float32 and kind.scalar == tl.bfloat16:
            values = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16)
            return interpreter.TensorHandle(values.view(torch.uint16).numpy(), kind.scalar)
        return cast(self, source, kind)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", rounding_cast)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fp_trunc", rounding_cast)


@pytest.fixture(autouse=True)
def multiply_bfloat16(monkeypatch):
    dot = interpreter.InterpreterBuilder.create_dot

    def wide(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        values = torch.from_numpy(np.ascontiguousarray(handle.data)).view(torch.bfloat16).float()
        return interpreter.TensorHandle(values.numpy(), tl.float32)

    monkeypatch.setattr(
        interpreter.InterpreterBuilder, "create_dot", lambda self, a, b, *others: dot(self, wide(a), wide(b), *others)
    )


def pytest_collection_modifyitems(config, items):
    """LOOPQ_SHARE="1/4" keeps the second of four equal shares: `python -m tests.gpu` runs them side by side."""
    which, count = map(int, os.environ.get("LOOPQ_SHARE", "0/1").split("/"))
    config.hook.pytest_deselected(items=[item for n, item in enumerate(items) if n % count != which])
    items[:] = items[which::count]
