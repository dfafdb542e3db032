"""Contestants of `bench speed` by turns, each in a process of its own."""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from loopq_compile._version import __version__
from loopq_compile.bench.cells import Cells, Values
from loopq_compile.bench.speed_reference import write_reference
from loopq_compile.bench.speed_session import Job, measure
from loopq_compile.errors import LoopQError
from loopq_compile.memory import trim


@dataclass(frozen=True)
class Contestant:
    """One row of the table.

    Args:
        runs, form: its words in the table.
        way: see `Job.way`.
        write: writes its file into a new folder; returns the file's name, and values for the row. None without a file.
        shares: contestants with the same text here have one file; "" for a file of its own.
        engine: what else determines the numbers, such as an engine's version.
    """

    runs: str
    form: str
    way: str = ""
    write: Callable[[Path], tuple[str, Values]] | None = None
    shares: str = ""
    engine: str = ""

    @property
    def name(self) -> str:
        """The row in one phrase."""
        return f"{self.runs}, {self.form}"

    @property
    def folder(self) -> str:
        """Name of the folder for its file."""
        return (self.shares or self.name).replace("/", "-")


class Contest:
    """Measures contestants by turns, so that a busy minute of the machine does not meet one of them alone.

    Args:
        job: the model, and what to measure. Its text is read in the first turn.
        turns: how often each is measured.
        cells: stores finished turns of each.
        say: called with what is being measured.
    """

    def __init__(self, job: Job, turns: int, cells: Cells, say: Callable[[str], None]) -> None:
        self.job, self.turns, self.cells, self.say = job, turns, cells, say
        self._written: dict[str, tuple[str, Values]] = {}

    def run(self, contestants: Sequence[Contestant]) -> list[Values]:
        """The row of each: the best of all turns. A row that fails says why in `failed`, and is tried again next
        time."""
        turns: list[list[Values]] = [[] for _ in contestants]
        with tempfile.TemporaryDirectory() as folder:
            for turn in range(self.turns):
                for at, contestant in enumerate(contestants):
                    if not any("failed" in x for x in turns[at]):
                        turns[at].append(self._cell(contestant, turn, Path(folder)))
                    needed = {x.folder for x in contestants[at + 1 :]}
                    if turn == self.turns - 1 and contestant.folder not in needed:
                        shutil.rmtree(Path(folder) / contestant.folder, ignore_errors=True)
        return [best(rows) for rows in turns]

    def _cell(self, contestant: Contestant, turn: int, folder: Path) -> Values:
        row = {"runs": contestant.runs, "form": contestant.form}
        job = replace(self.job, way=contestant.way, text=() if turn else self.job.text)
        about = {"speed": row, "version": __version__, "torch": torch.__version__, **asdict(job)}
        about |= ({"turn": turn} if turn else {}) | ({"engine": contestant.engine} if contestant.engine else {})
        self.say(contestant.name + (f", turn {turn + 1} of {self.turns}" if self.turns > 1 else ""))
        try:
            return row | self.cells.get(
                f"{row['runs']}-{row['form']}", about, lambda: self._measure(contestant, job, folder)
            )
        except LoopQError as error:
            self.say(f"failed: {error}")
            return row | {"failed": str(error)}

    def _measure(self, contestant: Contestant, job: Job, folder: Path) -> Values:
        reference = folder / "reference.npy" if job.text else None
        if reference is not None and not reference.exists():
            write_reference(replace(job, way="float32"), reference)
        if contestant.write is None:
            return measure(job, reference)
        home = folder / contestant.folder
        if contestant.folder not in self._written:
            shutil.rmtree(home, ignore_errors=True)  # of a contestant that failed
            home.mkdir()
            self._written[contestant.folder] = contestant.write(home)
            gc.collect()  # graphs and their nodes refer to each other
            trim()
        name, values = self._written[contestant.folder]
        return values | measure(replace(job, model=str(home / name), config=None), reference)


def best(turns: Sequence[Values]) -> Values:
    """One row of several turns: the highest rates, the shortest times, the least memory; a failed turn if there is
    one."""
    failed = [x for x in turns if "failed" in x]
    if failed or len(turns) == 1:
        return (failed or turns)[0]
    row = dict(turns[0])
    for key in ("load_ms", "memory", "peak"):
        row[key] = min(x[key] for x in turns)
    for key in ("prefill", "decode"):
        row[key] = {name: max(x[key][name] for x in turns) for name in row[key]}
    return row
