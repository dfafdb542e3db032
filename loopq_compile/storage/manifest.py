"""The manifest of a saved program or an export: which files belong to it, how long they are, and their SHA-256.

Reading starts here. Names must be plain file names, and files must be regular and inside the folder, so that nothing
outside is ever opened. Hashes are compared before anything is parsed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopq_compile._version import __version__
from loopq_compile.errors import LoopQError, first_line

MANIFEST_FILE = "manifest.json"
FAMILY = "loopq_compile."
"""Prefix of the formats of all manifests of this package."""
FORMAT = FAMILY + "artifact"
FORMAT_VERSION = 2
"""Version 1 had no manifest. A reader accepts every version whose `readable_from` is not above its own."""
_LARGEST_JSON = 1 << 30


@dataclass(frozen=True)
class ManifestKind:
    """A kind of manifest: its file name, format and version, and a word for people."""

    file: str
    format: str
    version: int
    what: str


PROGRAM = ManifestKind(MANIFEST_FILE, FORMAT, FORMAT_VERSION, "program")
RESULTS = ManifestKind("results_manifest.json", FAMILY + "results", 1, "result")
"""The manifest of `bench` and `demo`, by which they recognize their own files of an earlier run."""


@dataclass(frozen=True)
class FileRecord:
    """One file of a program: its name, its size in bytes, and its SHA-256 in hexadecimal."""

    name: str
    bytes: int
    sha256: str


def write_manifest(
    folder: Path,
    kind: ManifestKind = PROGRAM,
    names: Iterable[str] | None = None,
    more: dict[str, Any] | None = None,
    known: Mapping[str, Any] | None = None,
) -> None:
    """Writes the manifest about files of `folder`.

    Args:
        folder: folder of the program or export.
        kind: kind of manifest.
        names: names of files that belong to it; None for all in the folder.
        more: further entries to write.
        known: entries of an earlier manifest that are kept, by file name.

    Raises:
        OSError: a file cannot be read or the manifest cannot be written.
    """
    names = (path.name for path in folder.iterdir() if path.name != kind.file) if names is None else names
    made = {name: {"bytes": (folder / name).stat().st_size, "sha256": digest(folder / name)[1]} for name in names}
    content = {
        "format": kind.format,
        "version": kind.version,
        "readable_from": kind.version,
        "loopq_compile": __version__,
        **(more or {}),
        "files": dict(sorted({**(known or {}), **made}.items())),
    }
    (folder / kind.file).write_text(json.dumps(content, indent=1), encoding="utf-8")


def manifests(folder: Path) -> dict[str, dict[str, Any]]:
    """Entries of this package's manifests in `folder`, by name of the manifest and of the file.

    A damaged manifest counts as missing; a name that is not a plain file name is left out.
    """
    found = {}
    for path in sorted(folder.glob("*manifest.json")):
        with contextlib.suppress(LoopQError):
            data = read_json(path)
            if str(data.get("format")).startswith(FAMILY) and isinstance(data.get("files"), dict):
                found[path.name] = {name: entry for name, entry in data["files"].items() if _is_plain(name)}
    return found


def listed(folder: Path, kind: ManifestKind) -> dict[str, Any]:
    """The entries of one kind of manifest by file name; empty if there is no such manifest."""
    return manifests(folder).get(kind.file, {})


def check_files(folder: Path, needed: Iterable[str], kind: ManifestKind = PROGRAM) -> dict[str, FileRecord] | None:
    """Compares every file of a program with its manifest.

    Args:
        folder: folder of the program.
        needed: names that the manifest must list.
        kind: kind of manifest.

    Returns:
        Records by file name; None if there is no manifest, as in version 1.

    Raises:
        LoopQError: the manifest is damaged or from a newer version, or a file is missing, changed, or not a regular
            file inside the folder.
    """
    path = folder / kind.file
    if not os.path.lexists(path):
        return None
    data = read_json(path)
    if data.get("format") != kind.format or not isinstance(data.get("files"), dict):
        raise LoopQError(f"{path} is not the manifest of a loopq_compile {kind.what}.")
    check_version(folder, data, kind.version)
    records = {name: _record(path, name, entry) for name, entry in data["files"].items()}
    for name in needed:
        if name not in records:
            raise LoopQError(f"{path} is damaged: it does not list {name}.")
    for record in records.values():
        _compare(folder, record, kind.file)
    return records


def check_version(folder: Path, data: dict[str, Any], known: int = FORMAT_VERSION) -> None:
    """Refuses folders that only a newer version can read.

    Raises:
        LoopQError: the message names both versions and says what to do.
    """
    version = data.get("version")
    oldest = data.get("readable_from", version)
    if not isinstance(version, int) or not isinstance(oldest, int):
        raise LoopQError(f"{folder} is damaged: its format version is {version!r}, not a number.")
    if oldest > known:
        raise LoopQError(
            f"{folder} has format version {version} (written by loopq_compile {_short(data.get('loopq_compile'))}); "
            f"this version reads up to {known}. Update loopq_compile."
        )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a program.

    Raises:
        LoopQError: there is no such regular file, it is too large, or it holds something else.
    """
    check_regular(path)
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise LoopQError(f"{path} is larger than {_LARGEST_JSON >> 20} MiB; no program is described in so much.")
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or an absurd number
        raise LoopQError(f"{path} cannot be read: {first_line(error)}.") from error
    if not isinstance(data, dict):
        raise LoopQError(f"{path} is damaged: it must hold a JSON object.")
    return data


def check_regular(path: Path) -> None:
    """Refuses everything except a regular file: links may lead out of the folder, and pipes never end.

    A link into the `blobs` of the same model counts as a file, since the Hugging Face hub's cache stores files this
    way.

    Raises:
        LoopQError: the message says what it is.
    """
    try:
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode) and is_cached(path):
            mode = path.stat().st_mode
    except OSError as error:
        raise LoopQError(f"{path} cannot be read: {error.strerror}.") from error
    if not stat.S_ISREG(mode):
        kind = "a link" if stat.S_ISLNK(mode) else "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise LoopQError(f"{path} is {kind}; programs hold only regular files. Copy the file itself there.")


def is_cached(link: Path) -> bool:
    """Whether a link is a file of the hub's cache: `models--NAME/snapshots/HASH/FILE`, to `models--NAME/blobs/SHA`."""
    target = Path(os.path.realpath(link))
    folder = Path(os.path.realpath(link.parent))
    owners = [above.parent for above in folder.parents if above.name == "snapshots"]
    return any(target.parent == owner / "blobs" for owner in owners)


def check_name(name: object) -> str:
    """`name`, if it is a plain file name.

    Raises:
        LoopQError: it is a path, hidden, or has characters that file systems treat specially.
    """
    if not _is_plain(name):
        raise LoopQError(f"{_short(name)} is not a plain file name; a program lists only files of its own folder.")
    return str(name)


def _is_plain(name: object) -> bool:
    plain = isinstance(name, str) and 0 < len(name) < 128 and not name.startswith(".") and name.isprintable()
    return plain and not any(c in str(name) for c in '/\\:*?"<>|')


def digest(path: Path) -> tuple[int, str]:
    """Size and SHA-256 of a file.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), found


def _record(path: Path, name: str, entry: Any) -> FileRecord:
    try:
        check_name(name)
    except LoopQError as error:
        raise LoopQError(f"{path} is refused: {error}") from error
    size, found = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
    if not isinstance(size, int) or not isinstance(found, str):
        raise LoopQError(f"{path} is damaged: {name} has no size or no sha256.")
    return FileRecord(name, size, found)


def _compare(folder: Path, record: FileRecord, manifest: str) -> None:
    path = folder / record.name
    check_regular(path)
    try:
        size = path.stat().st_size
        if size != record.bytes:
            raise LoopQError(
                f"{path} does not match {manifest}: it has {size:,} bytes, not {record.bytes:,}; it was changed "
                "or cut off."
            )
        if digest(path)[1] != record.sha256:
            raise LoopQError(f"{path} does not match {manifest}: its SHA-256 differs; it was changed or cut off.")
    except OSError as error:
        raise LoopQError(f"{path} cannot be read: {error.strerror or error}.") from error


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
