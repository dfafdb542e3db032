"""A finished table or figure: as text for the terminal, as JSON, as Markdown, and as a picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from loopq_compile.bench.cells import plain
from loopq_compile.storage.atomic import writing_folder
from loopq_compile.storage.manifest import RESULTS

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class Report:
    """A table, and the figure that shows it.

    Args:
        name: name of the files.
        title: one line.
        columns, rows: the table as text; the first `text_columns` are words, the others numbers.
        data: the numbers of the table, for JSON.
        draw: draws the figure; None if there is nothing to draw.
        notes: sentences below the table.
    """

    name: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    data: Any
    draw: Callable[[Figure], None] | None = None
    text_columns: int = 1
    notes: list[str] = field(default_factory=list)

    def to_markdown(self) -> str:
        """Heading, table, notes."""
        kinds = [" --- "] * self.text_columns + [" ---: "] * (len(self.columns) - self.text_columns)
        lines = [f"# {self.title}", "", _line(self.columns), f"|{'|'.join(kinds)}|", *map(_line, self.rows)]
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)]) + "\n"

    def to_json(self, **about: Any) -> str:
        """The numbers, with `about` as facts about the study."""
        content = {**about, "name": self.name, "title": self.title, "notes": self.notes, "data": self.data}
        return json.dumps(plain(content), indent=2) + "\n"

    def write(self, directory: str | Path, **about: Any) -> list[Path]:
        """Writes `NAME.json`, `NAME.md` and, if matplotlib is installed, `NAME.png`.

        Raises:
            LoopQError: the directory cannot be written, or has a file of one of these names that is not ours.
        """
        names = [f"{self.name}.json", f"{self.name}.md"]
        with writing_folder(directory, RESULTS, add=True) as made:
            (made / names[0]).write_text(self.to_json(**about), encoding="utf-8")
            (made / names[1]).write_text(self.to_markdown(), encoding="utf-8")
            if self.draw is not None and has_matplotlib():
                names.append(f"{self.name}.png")
                self._picture(made / names[-1])
        return [Path(directory).expanduser() / name for name in names]

    def _picture(self, file: Path) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 5), layout="constrained")
        assert self.draw is not None
        self.draw(figure)
        figure.suptitle(self.title, fontsize=11)
        figure.savefig(file, dpi=150)


def has_matplotlib() -> bool:
    """Whether pictures can be drawn: matplotlib is in the extra `plot`."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def spread(values: Sequence[float | None], form: str) -> str:
    """Mean over seeds, `± standard deviation` if there are several; infinite values are named."""
    known = [value for value in values if value is not None]
    if not known:
        return "inf" if values else ""
    shown = format(mean(known), form)
    shown += f" ± {format(stdev(known), form)}" if len(known) > 1 else ""
    return shown if len(known) == len(values) else f"{shown} ({len(values) - len(known)} x inf)"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
