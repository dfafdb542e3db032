"""Output folders that are whole or not there."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from loopq_compile.errors import LoopQError


@contextlib.contextmanager
def replacing_folder(directory: str | os.PathLike[str], marker: str) -> Iterator[Path]:
    """Yields a temporary folder that becomes `directory` when the block ends well, and vanishes otherwise.

    Args:
        directory: where the folder shall stand. An empty folder, or one that holds `marker`, is replaced.
        marker: file by which an earlier output is known.

    Raises:
        LoopQError: something else stands there, or writing fails (no permission, disk full).
    """
    goal = check_folder(directory, marker)
    try:
        goal.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{goal.name}-", dir=goal.parent))
    except OSError as error:
        raise LoopQError(f"Cannot write to {goal}: {error.strerror or error}.") from error
    try:
        yield made
        made.chmod(0o755)
        for file in made.iterdir():
            file.chmod(0o644)
            _flush(file)
        _move_into_place(made, goal)
    except OSError as error:
        raise LoopQError(f"Cannot write {goal}: {error.strerror or error}. Nothing was changed there.") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _move_into_place(made: Path, goal: Path) -> None:
    """Puts `made` where `goal` is, in one step where the system can exchange two folders (Linux), else in two."""
    old = made.with_name(made.name + "-old")
    if not goal.exists():
        made.rename(goal)
    elif _exchange(made, goal):
        made.rename(old)
    else:
        goal.rename(old)
        try:
            made.rename(goal)
        except OSError:
            old.rename(goal)
            raise
    _flush(goal.parent)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """`renameat2(RENAME_EXCHANGE)`: a kill at any moment leaves a whole folder under both names. False if it failed."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _flush(path: Path) -> None:
    """Waits until a file, or what a folder lists, is on the disk; some file systems cannot, which is no failure."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def check_folder(directory: str | os.PathLike[str], marker: str) -> Path:
    """The absolute path of `directory`; refuses early what `replacing_folder` would refuse after the work is done.

    Raises:
        LoopQError: something else stands there, or the folder above it cannot be written.
    """
    goal = Path(directory).expanduser().absolute()
    try:
        if goal.exists() and not goal.is_dir():
            raise LoopQError(f"{goal} is a file; give a folder.")
        if goal.is_dir() and any(goal.iterdir()) and not (goal / marker).exists():
            raise LoopQError(f"{goal} holds other files and would be replaced; give a new or empty folder.")
        above = next(folder for folder in goal.parents if folder.exists())
    except OSError as error:
        raise LoopQError(f"Cannot write to {goal}: {error.strerror or error}.") from error
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise LoopQError(f"Cannot write to {goal}: no permission to write in {above}.")
    return goal
