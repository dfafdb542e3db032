"""Texts from files: every kind of file gives exactly its text, or one line that says what to do."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from typer.testing import CliRunner

from loopq_compile.cli import app
from loopq_compile.errors import LoopQError
from loopq_compile.sources import calibration_text, self_generated
from loopq_compile.sources.calibration_text import read_text
from loopq_compile.sources.self_generated import calibration_data

TEXTS = ["the first text {1}", "a second\nin two lines", "Größe, \U0001f600"]
WHOLE = "\n\n".join(TEXTS)
RECORDS = [{"meta": {"n": i}, "text": text, "id": i} for i, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", WHOLE),
        ("A.TXT", WHOLE),
        ("a.txt", WHOLE.encode("utf-8-sig")),
        ("a.txt", WHOLE.encode("utf-16")),
        ("a.txt", b"\xfe\xff" + WHOLE.encode("utf-16-be")),
        ("a.txt", WHOLE.encode("utf-32")),
        ("a.txt", WHOLE.replace("\n", "\r\n")),
        ("a.txt.gz", gzip.compress(WHOLE.encode(), mtime=0)),
        ("a.jsonl", LINES),
        ("a.ndjson", "\ufeff\n" + LINES.replace("\n", "\r\n\r\n")),
        ("a.json", LINES),
        ("a.jsonl", json.dumps(RECORDS)),
        ("a.json", json.dumps(RECORDS)),
        ("a.json", json.dumps(RECORDS, indent=2)),
        ("a.json", json.dumps(TEXTS)),
        ("a.json", "\n".join(map(json.dumps, TEXTS))),
        ("a.json", json.dumps({"id": [0, 1, 2], "text": TEXTS})),
        ("a.json", json.dumps({"text": TEXTS}, indent=1)),
        ("a.json", json.dumps({"text": dict(enumerate(TEXTS))})),
        ("a.json", json.dumps({"version": "1", "data": RECORDS})),
        ("a.json", json.dumps({"text": WHOLE})),
        ("a.jsonl", LINES + '{"text": null}\n{"text": " "}\n'),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("a.jsonl.bz2", bz2.compress(LINES.encode())),
        ("a.json.xz", lzma.compress(LINES.encode())),
    ],
)
def test_every_kind_of_file_gives_its_text(tmp_path: Path, name: str, content: str | bytes) -> None:
    assert read_text(put(tmp_path / name, content)) == WHOLE
    assert read_text(tmp_path / name, 10) == WHOLE[:10]


def test_the_pile_in_several_frames(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="needs the extra data")
    halves = [LINES[:40], LINES[40:]]
    packed = b"".join(arrow.compress(half.encode(), "zstd", asbytes=True) for half in halves)
    assert read_text(put(tmp_path / "00.jsonl.zst", packed)) == WHOLE
    with pytest.raises(LoopQError, match="cannot be read"):
        read_text(put(tmp_path / "01.jsonl.zst", packed[:30]))


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The library `datasets`, prevented from reading the network and from writing next to the data."""
    library = pytest.importorskip("datasets", reason="needs the extra data")

    def refused(*_: object) -> None:
        raise AssertionError("a text was fetched from the network")

    monkeypatch.setattr("socket.socket.connect", refused)
    return library


def test_parquet_and_saved_data_sets(tmp_path: Path, data) -> None:
    table = data.Dataset.from_list([*RECORDS, {"meta": {"n": 3}, "text": None, "id": 3}])
    table.to_parquet(tmp_path / "a.parquet")
    table.to_json(tmp_path / "a.json")
    table.with_format("numpy").save_to_disk(tmp_path / "saved")
    data.DatasetDict({"only": table}).save_to_disk(tmp_path / "one")
    other = data.Dataset.from_dict({"text": ["other"]})
    data.DatasetDict({"test": other, "train": table}).save_to_disk(tmp_path / "splits")
    before = sorted(tmp_path.rglob("*"))
    for name in ("a.parquet", "a.json", "saved", "one", "one/only", "splits/train"):
        assert read_text(tmp_path / name) == WHOLE
    assert read_text(tmp_path / "splits", split="train") == WHOLE
    with pytest.raises(LoopQError, match=r"has the splits test, train; name one of them: .*splits/test"):
        read_text(tmp_path / "splits")
    for name, where in (("a.parquet", "the table"), ("saved", "the data set")):
        with pytest.raises(LoopQError, match=rf"{where} has no field 'body'; it has meta, text, id"):
            read_text(f"{tmp_path / name}@body")
        with pytest.raises(LoopQError, match="field 'id' is not a text but int"):
            read_text(f"{tmp_path / name}@id")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_is_read_in_order_and_what_is_about_it_is_not(tmp_path: Path) -> None:
    put(tmp_path / "b.jsonl", json.dumps(RECORDS[1]))
    put(tmp_path / "a" / "x.txt", TEXTS[0])
    put(tmp_path / "c.json.gz", gzip.compress(json.dumps(RECORDS[2:]).encode()))
    put(tmp_path / "README.md", "# about")
    put(tmp_path / "LICENSE", "terms")
    put(tmp_path / "dataset_infos.json", "{}")
    put(tmp_path / ".cache" / "y.txt", "hidden")
    assert read_text(tmp_path) == WHOLE
    put(tmp_path / "notes.pdf", b"%PDF")
    with pytest.raises(LoopQError, match=r"notes.pdf is not a text that can be read"):
        read_text(tmp_path)


def test_a_field_is_named_behind_the_file(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl", '{"content": "c", "text": "t"}\n{"content": "d", "text": "u"}\n')
    assert read_text(f"{tmp_path}/a.jsonl@content") == "c\n\nd" and read_text(f"{tmp_path}@content") == "c\n\nd"
    put(tmp_path / "b@x.txt", "whole")
    assert read_text(tmp_path / "b@x.txt") == "whole"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "none.txt cannot be read: No such file"),
        ("a.txt", b"un caf\xe9", "after 'un caf' it has byte 0xe9"),
        ("a.jsonl", b'{"text": "caf\xe9"}', "not UTF-8"),
        ("a.txt", "abc".encode("utf-16-le"), "zero bytes"),
        ("a.txt", " \n", "is empty"),
        ("a.txt", b"", "is empty"),
        ("a.jsonl", b"", "is empty"),
        ("a.json", "[]", "is empty"),
        ("a.txt", LINES, "holds JSON records, not plain text"),
        ("a.txt", "version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "pointer of Git LFS"),
        ("a.jsonl", "version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "pointer of Git LFS"),
        ("a.csv", "text\nx\n", "not a text that can be read: give .txt, .jsonl"),
        ("a", "x", "not a text that can be read"),
        ("a.gz", gzip.compress(b"x", mtime=0), "not a text that can be read"),
        ("a.safetensors", b"\0", "not a text that can be read"),
        ("a.jsonl", '{"title": "x", "body": "y"}\n' * 2, r"record 1 has no field 'text'; it has title, body. Name"),
        ("a.jsonl", LINES + '{"body": "y"}\n', "record 4 has no field 'text'"),
        ("a.jsonl", LINES + '{"text": "cut', "record 4 is not JSON"),
        ("a.jsonl", '{"text": 5}\n{"text": "x"}', "field 'text' is not a text but int"),
        ("a.jsonl", '{"text": {"a": 1}}\n{"text": "x"}', "field 'text' is not a text but dict"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "x"}]}\n' * 2, "holds a chat.*apply_chat_template"),
        ("a.json", json.dumps([{"conversations": []}]), "holds a chat"),
        ("a.json", json.dumps({"messages": [{"role": "user"}]}), "holds a chat"),
        ("a.json", "[1, 2]", "is not a text but int"),
        ("a.json", '{\n"text": "x"\n', "is not JSON: line 3"),
        ("a.jsonl", "plain words\n", "is not JSON: line 1"),
        ("a.jsonl.gz", gzip.compress(LINES.encode() * 99, mtime=0)[:-30], "cannot be read"),
        ("a.jsonl.gz", LINES, "cannot be read"),
        ("a.json.xz", LINES, "cannot be read"),
        ("a.parquet", "x", "a.parquet"),
    ],
)
def test_the_rest_is_refused_in_one_line(tmp_path: Path, name: str, content: str | bytes | None, message: str) -> None:
    if content is not None:
        put(tmp_path / name, content)
    with pytest.raises(LoopQError, match=message) as caught:
        read_text(tmp_path / name)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_names_of_nothing_and_folders_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(LoopQError, match="got an empty one"):
        read_text("")
    with pytest.raises(LoopQError, match="holds no text"):
        read_text(tmp_path)


def test_half_a_pair_of_surrogates_is_replaced(tmp_path: Path) -> None:
    assert read_text(put(tmp_path / "a.jsonl", '{"text": "a\\ud800b \\ud83d\\ude00"}')) == "a\ufffdb \U0001f600"


@pytest.mark.parametrize("name", ["a.parquet", "saved", "a.jsonl.zst"])
def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    if name == "saved":
        put(tmp_path / name / "state.json", "{}")
        put(tmp_path / name / "dataset_info.json", "{}")
    else:
        put(tmp_path / name, "x")
    for library in ("datasets", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(LoopQError, match=r"pip install 'loopq-compile\[data\]'"):
        read_text(tmp_path / name)


def counting(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many records are requested."""
    seen = 0
    parsed = calibration_text._parsed

    def count(text: str) -> object:
        nonlocal seen
        seen += 1
        return parsed(text)

    monkeypatch.setattr(calibration_text, "_parsed", count)
    return lambda: seen


def words() -> Tokenizer:
    tokenizer = Tokenizer(WordLevel({"?": 0, **{f"w{i}": i + 1 for i in range(2000)}}, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    return tokenizer


def test_samples_come_from_the_texts_and_no_more_is_read_than_they_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (json.dumps({"meta": "braces", "text": " ".join(f"w{j}" for j in range(i, i + 10))}) for i in range(1500))
    file = put(tmp_path / "long.jsonl", "\n".join(lines))
    seen = counting(monkeypatch)
    rows = torch.cat(calibration_data(str(file), None, words(), 4, 10))
    assert rows.shape == (4, 10) and (rows > 0).all() and (rows.diff() == 1).all()
    assert seen() < 50
    sparse = put(tmp_path / "sparse.txt", ("w1" + " " * 1000) * 40)  # many characters per token
    assert torch.cat(calibration_data(str(sparse), None, words(), 2, 20)).eq(2).all()
    with pytest.raises(LoopQError, match="has 40 tokens, fewer than one sample of length 41"):
        calibration_data(str(sparse), None, words(), 1, 41)


@pytest.mark.parametrize(
    "command",
    [
        ["compile", "bundled", "--out", "p", "--calibration"],
        ["bisect", "bundled", "--calibration"],
        ["eval", "bundled", "--text"],
        ["report", "p", "--text"],
        ["bench", "quality", "--calibration"],
        ["bench", "quality", "--text"],
        ["bench", "table1", "--calibration"],
        ["bench", "fig6", "--text"],
        ["bench", "beyond", "--text"],
        ["bench", "exit", "--text"],
        ["bench", "cache", "--text"],
    ],
)
def test_commands_refuse_a_text_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("loopq_compile.sources.loading.load_model", load)
    put(tmp_path / "a.csv", "text\nx")
    done = CliRunner().invoke(app, [*command, "a.csv"])
    assert done.exit_code == 1 and "a.csv is not a text that can be read" in done.stderr
    assert self_generated.CALIBRATIONS == ("self", "docs", "mixed")
