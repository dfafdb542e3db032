"""The table in examples/README.md is that of `tests/architectures.py`, and pytest knows every test it names."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.architectures import ARCHITECTURES, FEATURES, NOTHING, table

ROOT = Path(__file__).parent.parent


def test_the_readme_has_the_table() -> None:
    readme = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    begin, end = "<!-- architectures -->\n", "\n<!-- /architectures -->"
    assert readme[readme.index(begin) + len(begin) : readme.index(end)] == table()


def test_no_cell_is_empty() -> None:
    for feature, cells in FEATURES.items():
        assert set(cells) == set(ARCHITECTURES), feature
        assert all(text and bool(test) == ((text, test) != NOTHING) for text, test in cells.values())


class Found:
    """A plugin that records what was collected."""

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.tests = {item.nodeid for item in session.items}


def test_the_tests_behind_the_cells_exist() -> None:
    """Collected by pytest itself, parameters included."""
    tests = {test for cells in FEATURES.values() for _, test in cells.values() if test}
    found = Found()
    files = sorted({str(ROOT / test.partition("::")[0]) for test in tests})
    options = ["--collect-only", "-q", "-p", "no:cacheprovider", "-p", "no:logging", f"--rootdir={ROOT}"]
    assert pytest.main([*options, *files], plugins=[found]) == 0
    assert not tests - found.tests
