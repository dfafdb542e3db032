"""The two kinds of errors: those a user can act on, and defects of this package."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class LoopQError(Exception):
    """Something the caller can fix: bad input, an impossible request, an unsupported model.

    The message says what is wrong, where (node, loop, source line), and what to do.
    """

    failure: Any = None
    """A `loopq_compile.debugging.PassFailure`: the failed pass, the passes before it, and the last valid program;
    None outside of pipelines."""


class CaptureError(LoopQError):
    """The model cannot be captured as one graph; the message names the source line and what to do."""


class InternalError(RuntimeError):
    """A pass or a backend broke a rule of the compiler: a defect of this package (or a custom pass), not of the
    input."""

    failure: Any = None
    """As in `LoopQError`."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'? Known: a, b, c."`, to be appended to an error about the unknown `name`."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{hint} Known: {', '.join(known)}."


def first_line(error: object) -> str:
    """The first line of an error, cut to a readable length."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300].rstrip(".")
