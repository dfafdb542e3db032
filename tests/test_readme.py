"""The documents: the README's code runs, links and commands exist, marks pair up, README and CONTRIBUTING are short."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from loopq_compile.cli import app

ROOT = Path(__file__).parent.parent
MOST_LINES = 180
_SKIPPED = ("node_modules", "build", "dist", "demo-output")
DOCUMENTS = [
    path.relative_to(ROOT)
    for path in sorted(ROOT.rglob("*.md"))
    if not any(part.startswith(".") or part in _SKIPPED for part in path.relative_to(ROOT).parts)
]
EVERY_DOCUMENT = pytest.mark.parametrize("document", DOCUMENTS, ids=str)
_CODE = re.compile(r"```(?:.|\n)*?```|`[^`\n]*`|^ {4}.*$", re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_COMMAND = re.compile(r"loopq-compile +([a-z][a-z0-9-]*)(?: +([a-z][a-z0-9-]*))?")
_MARK = re.compile(r"<!-- (.+): (begin|end) -->")


def text_of(document: Path) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def commands() -> dict[str, Any]:
    """Subcommands by name, of groups and of the program itself."""
    return typer.main.get_command(app).commands  # type: ignore[attr-defined]


def anchors(document: Path) -> set[str]:
    """What `#...` of a link may be: headings as GitHub writes them."""
    headings = re.findall(r"^#+ +(.+)$", text_of(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_first_code_of_the_readme_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = text_of(Path("README.md")).split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    promised = code.split("describe())  # ")[1].split("\n")[0]
    printed = capsys.readouterr().out
    assert printed.startswith(f"{promised}\n")
    assert "Return a new array" in printed
    assert (tmp_path / "my-program" / "program.json").is_file()
    assert (tmp_path / "my-onnx" / "model.onnx").is_file()


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_line_limits(document: str) -> None:
    assert len(text_of(Path(document)).splitlines()) <= MOST_LINES


@EVERY_DOCUMENT
def test_relative_links_lead_to_files_and_headings(document: Path) -> None:
    for link in _LINK.findall(_CODE.sub("", text_of(document))):
        if re.match(r"[a-z]+:", link):
            continue  # elsewhere on the network
        file, _, anchor = link.partition("#")
        target = (ROOT / document.parent / file).resolve() if file else ROOT / document
        assert target.exists(), f"{document} links to {link}"
        assert not anchor or anchor in anchors(target.relative_to(ROOT)), f"{document} links to {link}"


@EVERY_DOCUMENT
def test_every_command_that_is_named_exists(document: Path) -> None:
    for command, name in named(text_of(document)):
        assert command in commands(), f"{document} names loopq-compile {command}"
        group = getattr(commands()[command], "commands", None)
        assert group is None or not name or name in group, f"{document} names loopq-compile {command} {name}"


def named(text: str) -> Iterator[tuple[str, str]]:
    """Command and the word after it, in code and in tables, where a command is never followed by prose."""
    for piece in _CODE.findall(text):
        yield from _COMMAND.findall(piece)


@EVERY_DOCUMENT
def test_marks_pair_up_and_begin_with_a_command(document: Path) -> None:
    """A command rewrites the text between its marks, so they are unique, in order, and not nested."""
    found = _MARK.findall(text_of(document))
    assert [kind for _, kind in found] == ["begin", "end"] * (len(found) // 2)
    names = [name for name, _ in found[::2]]
    assert names == [name for name, _ in found[1::2]]
    assert len(set(names)) == len(names)
    known = {*commands()["bench"].commands, "figures of the demo", "dry-run", "upstream"}
    assert all(name in known or name.split()[0] in known for name in names)
