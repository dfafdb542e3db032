"""Output that is complete or absent, and never destroys other files in its folder.

New files are written into a hidden folder inside the target, `.loopq-part-XXXX`, on the same disk. When all of them are
complete, that folder is renamed to `.loopq-new`; from this moment the new output counts. `settle` then removes the old
files and moves the new ones up, the manifest last. A kill before the rename leaves the old output unchanged. After a
kill following the rename, the next reader or writer of the folder finishes the move.

Only files that a manifest of ours lists are replaced or removed. Everything else in the folder stays.

Under `torchrun` only the first process writes. What the others write goes to a folder for temporary files, and is
deleted.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from loopq_compile.errors import LoopQError
from loopq_compile.processes import leads
from loopq_compile.storage.manifest import RESULTS, ManifestKind, listed, manifests, write_manifest

_PART, _NEW = ".loopq-part-", ".loopq-new"


@contextlib.contextmanager
def writing_folder(
    directory: str | os.PathLike[str], kind: ManifestKind, *, add: bool = False, more: dict[str, Any] | None = None
) -> Iterator[Path]:
    """Yields a temporary folder; its files become those of `directory` if the block succeeds, and are deleted
    otherwise.

    Args:
        directory: where the files go. Other files there stay; a link to a folder stays a link.
        kind: kind of the manifest that is written about the files.
        add: whether to keep the files that an earlier manifest of this kind lists; otherwise they are removed.
        more: further entries of the manifest.

    Raises:
        LoopQError: there is a file with the same name that no manifest lists, or writing fails (no permission, disk
            full).
    """
    if not leads():
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
        return
    goal = check_folder(directory, kind)
    with _cannot_write(goal), _staging(goal) as (made, signals):
        yield made
        names = [path.name for path in made.iterdir()]
        with _locked(goal):
            _move_up(goal)
            _check_names(goal, names, kind, made)
            write_manifest(made, kind, names, more, listed(goal, kind) if add else {})
            for name in (*names, kind.file, "."):
                _flush(made / name)
            with signals.held():
                made.rename(goal / _NEW)
                _flush(goal)
                _move_up(goal)


def add_files(
    directory: str | os.PathLike[str],
    kind: ManifestKind,
    files: Mapping[str, str],
    more: dict[str, Any] | None = None,
) -> None:
    """Adds text files by name to a folder with a manifest.

    Args:
        directory: the folder.
        kind: kind of its manifest.
        files: text by file name.
        more: what else the manifest says.

    Raises:
        LoopQError: one of them exists and is not ours, or the folder cannot be written.
    """
    check_folder(directory, kind, files)
    with writing_folder(directory, kind, add=True, more=more) as made:
        for name, text in files.items():
            (made / name).write_text(text, encoding="utf-8")


@contextlib.contextmanager
def writing_file(file: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a path to write to; it becomes `file` if the block succeeds, and is deleted otherwise.

    A link to a file stays a link; a pipe or a device is written to directly.

    Raises:
        LoopQError: `file` is a folder, or writing fails.
    """
    if not leads():
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch) / Path(file).name
        return
    check_file(file)
    goal = real_path(file)
    with _cannot_write(goal):
        if goal.exists() and not goal.is_file():
            yield goal
            return
        with _staging(goal.parent) as (made, _):
            yield made / goal.name
            if goal.exists():
                shutil.copymode(goal, made / goal.name)
            _flush(made / goal.name)
            os.replace(made / goal.name, goal)


def write_text(file: str | os.PathLike[str], text: str) -> Path:
    """Writes text as UTF-8; an existing file stays until the new one is complete.

    Raises:
        LoopQError: the file cannot be written.
    """
    with writing_file(file) as path:
        path.write_text(text, encoding="utf-8")
    return Path(file).expanduser()


def write_results(directory: str | os.PathLike[str], texts: Mapping[str, str]) -> list[Path]:
    """Writes text files by name into a folder with earlier results.

    Raises:
        LoopQError: there is a file with one of these names that is not ours, or the folder cannot be written.
    """
    with writing_folder(directory, RESULTS, add=True) as made:
        for name, text in texts.items():
            (made / name).write_text(text, encoding="utf-8")
    return [Path(directory).expanduser() / name for name in texts]


def check_file(file: str | os.PathLike[str]) -> None:
    """Checks early what `writing_file` would refuse only after the work is done.

    Raises:
        LoopQError: it is a folder, or cannot be written.
    """
    goal = real_path(file)
    with _cannot_write(goal):
        if goal.is_dir():
            raise LoopQError(f"Cannot write to {goal}: it is a folder; give a file.")
        _check_writable(goal.parent if goal.is_file() else goal)


def check_folder(directory: str | os.PathLike[str], kind: ManifestKind, names: Iterable[str] = ()) -> Path:
    """The real path of `directory`; checks early what `writing_folder` would refuse only after the work is done.

    Args:
        directory: where files will be written.
        kind: kind of manifest.
        names: names of files, as far as they are known.

    Raises:
        LoopQError: it is a file or cannot be written, or holds a file with one of these names that is not ours.
    """
    goal = real_path(directory)
    with _cannot_write(goal):
        if goal.exists() and not goal.is_dir():
            raise LoopQError(f"Cannot write to {goal}: it is a file; give a folder.")
        _check_writable(goal)
        if goal.is_dir():
            _check_names(goal, names, kind)
    return goal


def settle(directory: str | os.PathLike[str]) -> None:
    """Finishes the move of a write that was killed after all of its files were complete; otherwise does nothing.

    Raises:
        LoopQError: the files cannot be moved.
    """
    goal = Path(directory)
    try:
        if _is_folder(goal / _NEW):
            with _locked(goal):
                _move_up(goal)
    except OSError as error:
        raise LoopQError(
            f"A write to {goal} was cut off and cannot be finished: {error.strerror or error}. Write it again, or "
            f"move the files in {goal / _NEW} up by hand."
        ) from error


def real_path(path: str | os.PathLike[str]) -> Path:
    """The absolute path with `~` and links resolved; for a broken link, its target.

    Raises:
        LoopQError: the path is empty, or links form a ring.
    """
    if not os.fspath(path):
        raise LoopQError("An output needs a path; got an empty one.")
    try:
        real = Path(path).expanduser().resolve()
        if real.is_symlink():
            raise LoopQError(f"{path} is a link that leads to itself.")
        return real
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: no such user, or a ring
        raise LoopQError(f"Cannot write to {path}: {error}.") from error


def _check_writable(goal: Path) -> None:
    above = next(folder for folder in (goal, *goal.parents) if folder.exists())
    if above != goal and not above.is_dir():
        raise LoopQError(f"Cannot write to {goal}: {above} is a file.")
    if not os.access(above, os.W_OK | (os.X_OK if above.is_dir() else 0)):
        raise LoopQError(f"Cannot write to {goal}: no permission to write in {above}.")


def _check_names(goal: Path, names: Iterable[str], kind: ManifestKind, made: Path | None = None) -> None:
    """Refuses names of existing files that are not ours, or that belong to an output of another kind."""
    known = manifests(goal)
    ours = {kind.file, *known.get(kind.file, ())} if kind.file in known else set()
    others = {name for file, files in known.items() if file != kind.file for name in files}
    for name in (kind.file, *names):
        there = goal / name
        if not os.path.lexists(there) or (name in ours - others and not _is_folder(there)):
            continue
        if name not in others:
            raise LoopQError(
                f"{there} is there already, and no manifest says that loopq_compile wrote it. Give another folder, or "
                "move that file away."
            )
        if made is not None and (made / name).read_bytes() != there.read_bytes():
            raise LoopQError(
                f"{there} belongs to another output of loopq_compile in that folder and would change. Give another "
                "folder."
            )


def _move_up(goal: Path) -> None:
    """Removes old files and moves those of `.loopq-new` into `goal`; continues where a killed process stopped.

    Old files are removed first, so that other programs find either the new ones or none, never a mixture.
    """
    ready = goal / _NEW
    if not _is_folder(ready):
        return
    before = manifests(goal)
    for file, files in manifests(ready).items():
        others = {name for other, names in before.items() if other != file for name in names}
        here = [name for name in files if os.path.lexists(ready / name)]
        for name in before.get(file, {}):
            if (name in here or name not in {*files, *others}) and not _is_folder(goal / name):
                (goal / name).unlink(missing_ok=True)
        for name in (*here, file):
            os.replace(ready / name, goal / name)
    shutil.rmtree(ready)
    _flush(goal)


@contextlib.contextmanager
def _staging(goal: Path) -> Iterator[tuple[Path, _Signals]]:
    """A hidden folder inside `goal`, deleted at the end of the block and on SIGTERM, like folders made for it.

    It stays locked while its process lives, so that others recognize folders left by a killed process.
    """
    made: Path | None = None
    new_folders = [folder for folder in (goal, *goal.parents) if not folder.exists()]
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(_Signals())
        try:
            goal.mkdir(parents=True, exist_ok=True)
            with _locked(goal):
                for left in goal.glob(f"{_PART}*"):
                    with _locked(left, wait=False) as free:
                        if free:
                            shutil.rmtree(left, ignore_errors=True)
                made = Path(tempfile.mkdtemp(prefix=_PART, dir=goal))
                stack.enter_context(_locked(made, wait=False))
            yield made, signals
        finally:
            if made is not None:
                shutil.rmtree(made, ignore_errors=True)
            for folder in new_folders:
                with contextlib.suppress(OSError):  # it is not empty, or others removed it
                    folder.rmdir()


@contextlib.contextmanager
def _locked(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Holds a lock on a folder, which ends with the process; yields whether it is held. Not every system has locks."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        except OSError:
            held = False
        yield held
    finally:
        os.close(handle)


class _Signals:
    """In this block, signals that would end the process raise an exception first, so that it cleans up."""

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._caught: list[int] = []
        self._hold = False

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGTERM", "SIGHUP", "SIGINT"):
                number = getattr(signal, name, None)
                if number and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    self._before[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._caught:
            os.kill(os.getpid(), self._caught[0])

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Signals wait until the end of `_Signals`."""
        self._hold = True
        yield

    def _stop(self, number: int, _: object) -> None:
        first = not self._caught
        self._caught.append(number)
        if first and not self._hold:
            raise SystemExit(128 + number)


@contextlib.contextmanager
def _cannot_write(goal: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LoopQError(f"Cannot write to {goal}: {error.strerror or error}.") from error


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _flush(path: Path) -> None:
    """Waits until a file, or a folder's list of files, is on the disk. Some file systems cannot do this; that is
    accepted."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
