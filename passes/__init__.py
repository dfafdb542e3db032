"""Passes: one file each. `Pass` and `PassResult` are what a custom pass needs."""

from loopq_compile.passes.base import Pass, PassResult

__all__ = ["Pass", "PassResult"]
