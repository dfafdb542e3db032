"""Passes: one file each. A custom pass needs `Pass` and `PassResult`."""

from loopq_compile.passes.base import Pass, PassResult

__all__ = ["Pass", "PassResult"]
