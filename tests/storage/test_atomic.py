"""Output folders: complete or absent, whatever kills the process, and files of others are never lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loopq_compile.cli import app
from loopq_compile.errors import LoopQError
from loopq_compile.storage import atomic
from loopq_compile.storage.artifact import save
from loopq_compile.storage.atomic import check_folder, settle, write_results, write_text, writing_file, writing_folder
from loopq_compile.storage.manifest import PROGRAM, ManifestKind, check_files, write_manifest
from tests.cli_models import tokenizer
from tests.permissions import as_somebody_else
from tests.tiny import tiny_program

OTHER = ManifestKind("onnx_manifest.json", "loopq_compile.onnx", 1, "export")


def put(directory: Path | str, kind: ManifestKind = PROGRAM, /, *, add: bool = False, **files: str) -> None:
    """Writes files `NAME.txt` with their texts."""
    with writing_folder(directory, kind, add=add) as made:
        for name, text in files.items():
            (made / f"{name}.txt").write_text(text)


def texts(folder: Path) -> dict[str, str]:
    """The files in a folder and below, without manifests."""
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith("manifest.json")
    }


def test_what_others_put_there_stays(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("main")
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "my-data").mkdir()
    (tmp_path / "my-data" / "a").write_text("1")
    theirs = texts(tmp_path)
    put(tmp_path, a="1", b="1")
    put(tmp_path, b="2", c="2")
    assert texts(tmp_path) == {**theirs, "b.txt": "2", "c.txt": "2"}
    assert set(check_files(tmp_path, ()) or ()) == {"b.txt", "c.txt"}


@pytest.mark.parametrize("name", ["a.txt", "manifest.json"])
@pytest.mark.parametrize("content", ["mine", '{"manifest_version": 3}', None])
def test_a_file_of_theirs_with_our_name_is_refused(tmp_path: Path, name: str, content: str | None) -> None:
    there = tmp_path / name
    there.mkdir() if content is None else there.write_text(content)
    with pytest.raises(LoopQError, match=rf"{name} is there already, and no manifest says"):
        check_folder(tmp_path, PROGRAM, ["a.txt"])
    with pytest.raises(LoopQError, match=rf"{name} is there already"):
        put(tmp_path, a="1")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert content is None or there.read_text() == content


def test_two_kinds_of_output_share_a_folder_and_files_that_are_equal(tmp_path: Path) -> None:
    put(tmp_path, a="1", both="1")
    put(tmp_path, OTHER, x="1", both="1")
    with pytest.raises(LoopQError, match=r"both.txt belongs to another output"):
        put(tmp_path, OTHER, x="2", both="2")
    put(tmp_path, OTHER, x="2")
    assert texts(tmp_path) == {"a.txt": "1", "both.txt": "1", "x.txt": "2"}
    assert check_files(tmp_path, ()) and check_files(tmp_path, (), OTHER)


def test_files_are_added_to_what_is_there(tmp_path: Path) -> None:
    put(tmp_path, a="1", b="1")
    put(tmp_path, add=True, b="2", c="2")
    assert texts(tmp_path) == {"a.txt": "1", "b.txt": "2", "c.txt": "2"}
    assert set(check_files(tmp_path, ()) or ()) == {"a.txt", "b.txt", "c.txt"}


@pytest.mark.parametrize("there", ["full", "empty", "nothing"])
def test_a_link_to_a_folder_is_written_through(tmp_path: Path, there: str) -> None:
    real = tmp_path / "disk" / "real"
    if there != "nothing":
        real.mkdir(parents=True)
    (tmp_path / "out").symlink_to(real)
    if there == "full":
        put(tmp_path / "out", old="1")
    put(f"{tmp_path}/out/", a="1")
    assert (tmp_path / "out").is_symlink() and texts(real) == {"a.txt": "1"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out"]
    assert [path.name for path in real.parent.iterdir()] == ["real"]


def test_all_ways_to_name_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in (".", "./a/../a/", "~/home", "new/below/new"):
        put(name, a="1")
    assert set(texts(tmp_path)) == {"a.txt", "a/a.txt", "home/a.txt", "new/below/new/a.txt"}


def test_what_cannot_be_written_is_refused_early_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "ring").symlink_to("ring")
    (tmp_path / "locked").mkdir(mode=0o555)
    tmp_path.chmod(0o755)
    for name in ("file", "file/below", "ring", "ring/below", "x" * 300, "locked/out", "locked", "~nobody-of-this-name"):
        target = name if name.startswith("~") else tmp_path / name
        with as_somebody_else(), pytest.raises(LoopQError) as caught:
            check_folder(target, PROGRAM)
        assert "\n" not in str(caught.value)
        with as_somebody_else(), pytest.raises(LoopQError):
            put(target, a="1")
    with pytest.raises(LoopQError, match="needs a path"):
        put("", a="1")
    assert texts(tmp_path) == {"file": "x"}


def test_an_error_leaves_no_folder_that_was_not_there(tmp_path: Path) -> None:
    for target in (tmp_path / "new" / "below", tmp_path):
        with pytest.raises(ZeroDivisionError), writing_folder(target, PROGRAM) as made:
            (made / "a.txt").write_text("1")
            raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


class Killed(BaseException):
    """Instead of SIGKILL: nothing after it happens."""


def steps_of_moving(folder: Path, monkeypatch: pytest.MonkeyPatch, *, kill_at: int) -> bool:
    """Writes b and c over a and b, and is killed before a step that changes names on the disk; returns whether it got
    there."""
    left = kill_at

    def counted(do):
        def step(*args, **options):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return do(*args, **options)

        return step

    with monkeypatch.context() as patch:
        for owner, name in ((os, "replace"), (Path, "unlink"), (Path, "rename"), (atomic.shutil, "rmtree")):
            patch.setattr(owner, name, counted(getattr(owner, name)))
        try:
            put(folder, b="2", c="2")
        except Killed:
            return True
    return False


def test_a_kill_at_any_step_leaves_the_old_or_the_new_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for step in range(100):
        folder = tmp_path / str(step)
        put(folder, a="1", b="1")
        (folder / "mine").write_text("mine")
        if not steps_of_moving(folder, monkeypatch, kill_at=step):
            break
        settle(folder)
        check_files(folder, ())
        found = {name: text for name, text in texts(folder).items() if not name.startswith(".loopq-part-")}
        assert found.pop("mine") == "mine"
        assert found in ({"a.txt": "1", "b.txt": "1"}, {"b.txt": "2", "c.txt": "2"}), step
        seen.append(len(found) and found["b.txt"])
        put(folder, a="3")
        assert texts(folder) == {"a.txt": "3", "mine": "mine"}  # no leftovers of the killed one either
    assert seen == sorted(seen) and {"1", "2"} == set(seen) and step > 6


def test_a_write_that_nobody_can_finish_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, a="1", b="1")
    assert steps_of_moving(tmp_path, monkeypatch, kill_at=2)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(LoopQError, match="was cut off and cannot be finished: Permission denied"):
        settle(tmp_path)


def test_a_strangers_link_in_place_of_a_waiting_write_is_left_alone(tmp_path: Path) -> None:
    put(tmp_path / "other", a="1")
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / ".loopq-new").symlink_to(tmp_path / "other")
    settle(tmp_path / "p")
    assert texts(tmp_path / "other") == {"a.txt": "1"}


WRITER = """
import sys, time
from pathlib import Path
from loopq_compile.storage.atomic import writing_file, writing_folder
from loopq_compile.storage.manifest import PROGRAM
with (writing_folder(sys.argv[1], PROGRAM) if sys.argv[2] == "folder" else writing_file(sys.argv[1] + "/a.txt")) as at:
    (at / "a.txt" if at.is_dir() else at).write_text("new")
    print("ready", flush=True)
    time.sleep(60)
"""


def writer(folder: Path, kind: str) -> subprocess.Popen[str]:
    """A process in the middle of writing."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, folder, kind], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("kind", ["folder", "file"])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_leaves_nothing(tmp_path: Path, kind: str, name: str) -> None:
    process = writer(tmp_path / "new" / "out", kind)
    process.send_signal(getattr(signal, name))
    assert process.wait(30) == -getattr(signal, name)
    assert list(tmp_path.iterdir()) == []


def test_after_a_kill_the_next_write_takes_leftovers_of_the_dead_and_not_of_the_living(tmp_path: Path) -> None:
    put(tmp_path, a="old")
    living, dead = writer(tmp_path, "folder"), writer(tmp_path, "file")
    dead.kill()
    dead.wait(30)
    try:
        assert len(list(tmp_path.glob(".loopq-part-*"))) == 2
        put(tmp_path, a="between")
        assert len(list(tmp_path.glob(".loopq-part-*"))) == 1
    finally:
        living.kill()
        living.wait(30)
    put(tmp_path, a="last")
    assert texts(tmp_path) == {"a.txt": "last"}


def test_of_writers_at_the_same_time_one_wins_whole(tmp_path: Path) -> None:
    def write(number: int) -> None:
        for _ in range(5):
            put(tmp_path, **{name: str(number) for name in ("a", "b", "c", f"only{number}")})

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = texts(tmp_path)
    assert len(found) == 4 and len(set(found.values())) == 1
    assert set(check_files(tmp_path, ()) or ()) == set(found)


def test_old_data_with_several_names_is_not_written_into(tmp_path: Path) -> None:
    put(tmp_path / "p", a="old")
    os.link(tmp_path / "p" / "a.txt", tmp_path / "backup")
    put(tmp_path / "p", a="new")
    assert (tmp_path / "backup").read_text() == "old" and texts(tmp_path / "p") == {"a.txt": "new"}


def test_files_have_the_permissions_that_the_user_wants(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        put(tmp_path / "p", a="1")
        write_text(tmp_path / "report.html", "x")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == {"p": 0o750, "a.txt": 0o640, "manifest.json": 0o640, "report.html": 0o640}
    (tmp_path / "report.html").chmod(0o600)
    write_text(tmp_path / "report.html", "y")
    assert (tmp_path / "report.html").stat().st_mode & 0o777 == 0o600


def test_a_link_to_a_file_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "shelf").mkdir()
    (tmp_path / "report.html").symlink_to("shelf/real.html")
    for text in ("1", "2"):
        write_text(tmp_path / "report.html", text)
        assert (tmp_path / "report.html").is_symlink() and texts(tmp_path / "shelf") == {"real.html": text}


def test_a_pipe_is_written_to_and_a_folder_is_not(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE, text=True)
    write_text(tmp_path / "pipe", "through")
    assert reader.communicate(timeout=30)[0] == "through" and (tmp_path / "pipe").is_fifo()
    with pytest.raises(LoopQError, match="is a folder; give a file"):
        write_text(tmp_path, "x")
    with pytest.raises(LoopQError, match="Cannot write"):
        write_text(tmp_path / "pipe" / "below", "x")


def test_an_error_keeps_the_older_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    with pytest.raises(ZeroDivisionError), writing_file(tmp_path / "a") as path:
        path.write_text("half")
        raise ZeroDivisionError
    assert texts(tmp_path) == {"a": "old"}


def test_a_damaged_manifest_lists_nothing(tmp_path: Path) -> None:
    put(tmp_path, a="1")
    manifest = tmp_path / "manifest.json"
    content = json.loads(manifest.read_text())
    content["files"] |= {"../b.txt": {}, ".hidden": {}}
    manifest.write_text(json.dumps(content))
    (tmp_path.parent / "b.txt").write_text("mine")
    (tmp_path / ".hidden").write_text("mine")
    put(tmp_path, a="2")
    assert (tmp_path.parent / "b.txt").read_text() == "mine" and (tmp_path / ".hidden").read_text() == "mine"
    manifest.write_text("{")
    with pytest.raises(LoopQError, match=r"manifest.json is there already"):
        put(tmp_path, a="3")
    write_manifest(tmp_path, PROGRAM, ["a.txt"])
    put(tmp_path, a="3")


def refused(monkeypatch: pytest.MonkeyPatch, *command: object) -> str:
    """The line with which a command ends before it loads a model."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    for name in ("loopq_compile.sources.loading.load_model", "loopq_compile.bundled.load_model"):
        monkeypatch.setattr(name, load)
    done = CliRunner().invoke(app, [str(part) for part in command])
    assert done.exit_code == 1, done.output
    return done.stderr.strip()


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["compile", "bundled"], "program.json"),
        (["compile", "bundled"], "manifest.json"),
        (["bench", "quality"], "quality.md"),
        (["bench", "table1"], "table1.json"),
        (["bench", "speed"], "speed.png"),
        (["demo"], "program.py"),
        (["demo"], "onnx/model.onnx"),
        (["demo"], "program/tokenizer.json"),
    ],
)
def test_commands_refuse_to_replace_what_is_not_ours_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], name: str
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    assert f"{name} is there already, and no manifest says" in refused(monkeypatch, *command, "--out", tmp_path)
    assert texts(tmp_path) == ({} if name == "manifest.json" else {name: "mine"})


def test_commands_refuse_a_place_that_cannot_be_written_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    for command in (["compile", "bundled"], ["bench", "fig1"], ["demo"]):
        assert "is a file; give a folder" in refused(monkeypatch, *command, "--out", tmp_path / "file")
    assert "is a file" in refused(
        monkeypatch, "compile", "bundled", "--out", tmp_path / "p", "--checkpoint", tmp_path / "file"
    )
    assert "is a folder; give a file" in refused(monkeypatch, "report", "p", "--out", tmp_path)
    assert "is a file" in refused(
        monkeypatch, "report", "p", "--out", tmp_path / "r.html", "--model", "x", "--svg", tmp_path / "file" / "x.svg"
    )
    assert texts(tmp_path) == {"file": "x"}


def test_an_export_beside_a_tokenizer_of_theirs_is_refused_whole(tmp_path: Path) -> None:
    save(tiny_program("w4a8", "symmetric").graph_module, tmp_path / "p", {"tokenizer.json": tokenizer().to_str()})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer.json").write_text("mine")
    for options in ([], ["--target", "triton", "--sm", "80"]):
        done = CliRunner().invoke(app, ["export", str(tmp_path / "p"), "--out", str(tmp_path / "out"), *options])
        assert done.exit_code == 1 and "tokenizer.json is there already" in done.stderr
    assert texts(tmp_path / "out") == {"tokenizer.json": "mine"}


def test_results_of_a_run_go_beside_those_of_another(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("mine")
    for text in ("1", "2"):
        write_results(tmp_path, {f"only{text}.md": text, "both.md": text})
    assert texts(tmp_path) == {"notes.md": "mine", "only1.md": "1", "only2.md": "2", "both.md": "2"}
