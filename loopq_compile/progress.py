"""Progress bars for long steps: shown on a terminal, silent elsewhere, and where rich is missing."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from loopq_compile.processes import leads

Item = TypeVar("Item")


def _bar(state: str = "") -> Any:
    """A `rich.progress.Progress` on standard error; None where nobody would see it, and in all processes but the first.

    Args:
        state: a text column for numbers of the step.
    """
    if not sys.stderr.isatty() or not leads():
        return None
    try:
        from rich import progress
        from rich.console import Console
    except ImportError:
        return None
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        *([progress.TextColumn(state)] if state else []),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def progress(items: Iterable[Item], title: str, total: int | None = None) -> Iterator[Item]:
    """Yields `items` with a progress bar on standard error, if that is a terminal."""
    bar = _bar()
    if bar is None:
        yield from items
        return
    with bar:
        yield from bar.track(items, total=total, description=title)


def remark(text: str) -> None:
    """Prints a line on standard error, in the first process only: what a run that takes long has decided."""
    if leads():
        print(text, file=sys.stderr)


class StepProgress:
    """A bar for a calibration: steps, loss, learning rate, time left; on standard error, if that is a terminal.

    Args:
        title: text before the bar.
        total: number of steps.
        done: steps done by an earlier run.
    """

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        self._bar = _bar("{task.fields[state]}")
        self._task = self._bar and self._bar.add_task(title, total=total, completed=done, state="")

    def __enter__(self) -> StepProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, loss: float, rate: float, validation: float) -> None:
        """Reports that one step is done."""
        if self._bar is not None:
            state = f"loss {loss:.4f}  best {validation:.4f}  rate {rate:.2f}"
            self._bar.update(self._task, advance=1, state=state)
