"""Reads texts from files: plain, JSON records, Parquet, saved data sets, folders of these, compressed or not.

Reads no more than requested, writes nothing, and uses no network.
"""

from __future__ import annotations

import bz2
import gzip
import io
import itertools
import json
import lzma
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from loopq_compile.errors import LoopQError, first_line

FIELD = "text"
"""Default field of the text in records."""
JOINT = "\n\n"
"""Separator of two texts."""
_RECORDS, _PLAIN, _TABLE = (".jsonl", ".ndjson", ".json"), (".txt",), (".parquet",)
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_CHATS = ("messages", "conversations", "conversation")
_ASIDE = ("readme", "license", "dataset_info", "dataset_infos")
"""Prefixes of names that are not data in folders of data."""
_LARGEST_VALUE = 1 << 30
"""Most characters of one JSON value, which must fit into memory as a whole."""
_NOT_JSON = object()
_POINTER = "version https://git-lfs"
_MARKS = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
"""Byte-order marks, the longer ones first; UTF-8 is read with or without one."""


def read_text(source: str | os.PathLike[str], limit: int | None = None, *, split: str | None = None) -> str:
    """The text in `source`. Several texts are joined with an empty line between them; empty ones are left out.

    Args:
        source: a `.txt` file in UTF-8, or UTF-16 or UTF-32 with a byte-order mark; a file of JSON records (`.jsonl`,
            `.ndjson`, `.json`); one of these compressed (`.gz`, `.bz2`, `.xz`, `.zst`); a `.parquet` file; a folder
            that `datasets` saved; or a folder of these, read in the order of names. Records have their text in the
            field `text`; `FILE@FIELD` names another.
        limit: stop after this many characters; None reads all.
        split: split of a saved data set with several; None requires `FOLDER/SPLIT` as source.

    Raises:
        LoopQError: the source is missing, of another kind, damaged, empty, or has no such field; or `datasets` is
            needed but not installed.
    """
    path, field = _parse(source)
    parts: list[str] = []
    count = 0
    for text in _texts(path, field, limit, split):
        if text.strip():
            parts.append(text)
            count += len(text) + len(JOINT)
        if limit is not None and count >= limit:
            break
    if not parts:
        raise LoopQError(f"{source} is empty: it holds no text.")
    return JOINT.join(parts)[:limit]


def _parse(source: str | os.PathLike[str]) -> tuple[Path, str]:
    if not os.fspath(source):
        raise LoopQError("A text needs the name of a file or folder; got an empty one.")
    path = Path(source).expanduser()
    before, found, field = str(path).rpartition("@")
    return (Path(before), field) if found and field and not path.exists() and Path(before).exists() else (path, FIELD)


def _texts(path: Path, field: str, limit: int | None, split: str | None) -> Iterator[str]:
    """All texts of a file or folder; every problem becomes an error that names the file."""
    try:
        if path.is_dir():
            yield from _texts_of_folder(path, field, limit, split)
            return
        kind = _kind(path)
        if kind in _TABLE:
            yield from _strings(_table(path, field), path, field)
            return
        with _open(path) as stream:
            if kind in _PLAIN:
                yield _plain(path, stream.read(-1 if limit is None else limit))
            elif kind in _RECORDS:
                yield from _strings(_records(path, stream, field), path, field)
            else:
                raise LoopQError(
                    f"{path} is not a text that can be read: give .txt, .jsonl, .json (also compressed: "
                    f"{', '.join(_COMPRESSED)}), .parquet, a folder of these, or a folder that `datasets` saved."
                )
    except LoopQError:
        raise
    except UnicodeDecodeError as error:
        before = error.object[max(0, error.start - 20) : error.start].decode("utf-8", "replace")
        raise LoopQError(
            f"{path} is not UTF-8 text: after {before!r} it has byte {error.object[error.start]:#04x}. Convert it, for "
            "instance with iconv."
        ) from error
    except OSError as error:
        raise LoopQError(f"{path} cannot be read: {error.strerror or first_line(error)}.") from error
    except Exception as error:  # untrusted data; decompressors, pyarrow and datasets raise many kinds of errors
        raise LoopQError(f"{path} cannot be read: {type(error).__name__}: {first_line(error)}.") from error


def _texts_of_folder(path: Path, field: str, limit: int | None, split: str | None) -> Iterator[str]:
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        chosen = split if split in splits else splits[0] if len(splits) == 1 else None
        if chosen is None:
            raise LoopQError(f"{path} has the splits {', '.join(splits)}; name one of them: {path / splits[0]}.")
        path = path / chosen
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        yield from _strings(_saved(path, field), path, field)
        return
    entries = [e for e in sorted(path.iterdir()) if not e.name.startswith(".") and e.stem.lower() not in _ASIDE]
    if not entries:
        raise LoopQError(f"Folder {path} holds no text: no .txt, .jsonl, .json or .parquet file.")
    for entry in entries:
        yield from _texts(entry, field, limit, split)


def _kind(path: Path) -> str:
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in _COMPRESSED else suffix


def _open(path: Path) -> TextIO:
    """The characters of a file, unpacked if it is compressed."""
    suffix = path.suffix.lower()
    raw: Any
    if suffix == ".zst":
        arrow = _library("pyarrow", path)
        raw = arrow.CompressedInputStream(arrow.OSFile(str(path)), "zstd")
    else:
        ways: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
        raw = ways.get(suffix, open)(path, "rb")
    stream = io.BufferedReader(raw)
    start = stream.peek(4)
    encoding = next((name for mark, name in _MARKS.items() if start.startswith(mark)), "utf-8-sig")
    return io.TextIOWrapper(cast(BinaryIO, stream), encoding)


def _plain(path: Path, text: str) -> str:
    """Refuses files that are text only by name."""
    if "\0" in text:
        raise LoopQError(f"{path} is not a text: it holds zero bytes. If it is UTF-16, convert it to UTF-8.")
    if text.startswith(_POINTER):
        raise LoopQError(f"{path} is a pointer of Git LFS, not the file itself; get it with `git lfs pull`.")
    if text.lstrip()[:1] == "{" and isinstance(_parsed(text.lstrip().splitlines()[0]), dict):
        raise LoopQError(f"{path} holds JSON records, not plain text; give its name the ending .jsonl.")
    return text


def _records(path: Path, stream: TextIO, field: str) -> Iterator[tuple[str, Any]]:
    """The place of each record, and the record: from JSON lines, or from one JSON value with all of them."""
    lines = (line for line in iter(lambda: stream.readline(_LARGEST_VALUE), "") if line.strip())
    first = next(lines, "null")
    if first.startswith(_POINTER):
        _plain(path, first)
    is_value = _parsed(first) is not _NOT_JSON
    second = next(lines, None) if is_value else None
    if second is None:
        value = _parsed(first) if is_value else _whole(path, first + stream.read(_LARGEST_VALUE))
        yield from ((f"record {index}", record) for index, record in enumerate(_rows(value, field), 1))
        return
    for index, line in enumerate(itertools.chain((first, second), lines), 1):
        record = _parsed(line)
        if record is _NOT_JSON:
            raise LoopQError(f"{path} is damaged: record {index} is not JSON: {line.strip()[:40]!r}.")
        yield f"record {index}", record


def _parsed(text: str) -> Any:
    """A text parsed as a JSON value."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _NOT_JSON


def _whole(path: Path, text: str) -> Any:
    if len(text) >= _LARGEST_VALUE:
        raise LoopQError(f"{path} is one JSON value of more than {_LARGEST_VALUE >> 20} MiB; save it as JSON lines.")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise LoopQError(f"{path} is not JSON: line {error.lineno}: {error.msg}.") from error


def _rows(value: Any, field: str) -> Iterable[Any]:
    """The records of one JSON value: a list, columns as lists or by index, a list under some name, or one record."""
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        return [value]
    column = value.get(field)
    if isinstance(column, dict):
        return [{field: text} for text in column.values()]
    lists = [rows for rows in value.values() if isinstance(rows, list) and rows and isinstance(rows[0], dict)]
    chat = any(name in value for name in _CHATS)
    return lists[0] if column is None and len(lists) == 1 and not chat else [value]


def _strings(records: Iterable[tuple[str, Any]], path: Path, field: str) -> Iterator[str]:
    for where, record in records:
        value = record
        if isinstance(record, dict):
            if field not in record:
                raise LoopQError(_missing(path, where, field, list(record)))
            value = record[field]
        for text in value if isinstance(value, list) else [value]:
            if text is not None and not isinstance(text, str):
                raise LoopQError(
                    f"{path}, {where}: field {field!r} is not a text but {type(text).__name__}. Name the field that "
                    f"holds the text: {path}@FIELD."
                )
            yield (text or "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _missing(path: Path, where: str, field: str, fields: list[str]) -> str:
    if chat := next((name for name in _CHATS if name in fields), None):
        return (
            f"{path}, {where}: field {chat!r} holds a chat, not a text. Render chats with the tokenizer's "
            f"apply_chat_template and save them as field {FIELD!r}."
        )
    listed = ", ".join(map(str, fields[:20])) or "no field at all"
    example = next((name for name in fields if name != field), "FIELD")
    return f"{path}, {where} has no field {field!r}; it has {listed}. Name another: {path}@{example}."


def _table(path: Path, field: str) -> Iterator[tuple[str, Any]]:
    parquet = _library("pyarrow.parquet", path)
    with parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if field not in names:
            raise LoopQError(_missing(path, "the table", field, names))
        for batch in file.iter_batches(256, columns=[field]):
            yield from (("the table", {field: value}) for value in batch.column(0).to_pylist())


def _saved(path: Path, field: str) -> Iterator[tuple[str, Any]]:
    data = _library("datasets", path).load_from_disk(str(path))
    if field not in data.column_names:
        raise LoopQError(_missing(path, "the data set", field, data.column_names))
    for batch in data.select_columns([field]).with_format(None).iter(256):
        yield from (("the data set", {field: value}) for value in batch[field])


def _library(name: str, path: Path) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise LoopQError(
            f"{path} is read with the library datasets, which is not installed: pip install 'loopq-compile[data]'."
        ) from error
