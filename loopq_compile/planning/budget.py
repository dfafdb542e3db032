"""How many steps fit into a number of minutes.

The schedule of the learning rate is a function of the number of steps, so that number is fixed before the first one. A
rehearsal measures what every pass takes whatever the number is, and what a step takes. The largest number whose
predicted time fits is chosen. It is kept in the checkpoint folder, so a run that was killed goes on with the same.
"""

from __future__ import annotations

import json
import math
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import fx

from loopq_compile.calibration import distributed
from loopq_compile.calibration.batches import calibration_batches
from loopq_compile.errors import LoopQError
from loopq_compile.graph.device import device_of
from loopq_compile.graph.options import CalibrationOptions
from loopq_compile.graph.state import LogEntry, get_state
from loopq_compile.memory import trim
from loopq_compile.passes.learn.calibrate import Calibrate, fingerprint
from loopq_compile.passes.learn.calibrate_blocks import CalibrateBlocks
from loopq_compile.pipeline import Pipeline
from loopq_compile.planning.costs import Rehearsed
from loopq_compile.planning.rehearsal import Rehearsal
from loopq_compile.processes import leads
from loopq_compile.progress import remark
from loopq_compile.storage.atomic import write_text

BUDGET_FILE = "budget.json"
LOG_NAME = "budget"
"""Name of the entry in a program's log."""
RESERVE = 0.1
"""Share of the minutes that is not planned for: predictions are that exact (`loopq-compile bench memory`)."""
REPEATS = 4
"""A text that is read more often than this teaches less than new text would."""
_MOST = 1_000_000
"""Steps, whatever the budget."""


@dataclass(frozen=True)
class Budget:
    """What was chosen.

    Args:
        steps: of the whole calibration.
        seconds: predicted time of the compilation, the rehearsal included.
        text: the choice in words.
    """

    steps: int
    seconds: float
    text: str


def check_learns(pipeline: Pipeline, minutes: float, has_data: bool) -> None:
    """Refuses minutes for something that takes no steps.

    Raises:
        LoopQError: the method learns nothing, or there is no text to learn from.
    """
    if not any(isinstance(item, Calibrate | CalibrateBlocks) for item in pipeline):
        raise LoopQError(f"Method {pipeline.name!r} learns nothing, so minutes={minutes:g} has no use. Leave it out.")
    if not has_data:
        raise LoopQError(f"minutes={minutes:g} is time to learn, which needs calibration data. Leave it out.")


def fit(rehearsed: Rehearsed, minutes: float, spent: float) -> Budget:
    """The largest number of steps whose predicted time fits.

    Args:
        rehearsed: measured with the options of the calibration.
        minutes: for everything.
        spent: seconds that the rehearsal took, which count.

    Raises:
        LoopQError: nothing can be learned, or even the least number of steps takes longer; the message says how long.
    """
    phases = rehearsed.phases
    if not phases:
        raise LoopQError(f"The method finds nothing to learn in this model, so minutes={minutes:g} has no use.")
    least = len(phases)
    available = (1 - RESERVE) * 60 * minutes - spent
    fitting = bisect_right(range(least, _MOST + 1), available, key=rehearsed.seconds)
    if not fitting:
        needed = (rehearsed.seconds(least) + spent) / (1 - RESERVE) / 60
        raise LoopQError(
            f"minutes={minutes:g} are too few. With {least} steps, one for each phase, this compilation takes about "
            f"{needed:.2g} minutes on this machine, of which {spent / 60:.2g} go into measuring it. Give at least "
            f"{_upwards(needed):g}; what is above that becomes steps."
        )
    steps = least + fitting - 1
    seconds = rehearsed.seconds(steps) + spent
    return Budget(steps, seconds, _words(rehearsed, steps, minutes, seconds))


def _words(rehearsed: Rehearsed, steps: int, minutes: float, seconds: float) -> str:
    options, times = rehearsed.options, steps / rehearsed.learn
    read = f"{times:.0%} of the calibration text" if times < 1 else f"the calibration text {times:.2g} times"
    text = (
        f"{steps} steps of {options.batch_rows} samples fit into {minutes:g} minutes (predicted: "
        f"{seconds / 60:.2g}); they read {read}"
    )
    if times <= REPEATS:
        return text
    samples = math.ceil(steps / REPEATS) * options.batch_rows / (1 - options.validation)
    return f"{text}, so it is too short: give about {math.ceil(samples)} samples (--samples)"


def _upwards(value: float) -> float:
    """The next number with two digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return math.ceil(value / unit) * unit


def rehearsal_options(options: CalibrationOptions) -> CalibrationOptions:
    """With `fused="auto"` a budget compiles elementwise functions, so that a step takes what it took when measured."""
    return replace(options, minutes=None, fused="on" if options.fused == "auto" else options.fused)


def settle_steps(graph_module: fx.GraphModule, pipeline: Pipeline) -> None:
    """Replaces the option `minutes` in the graph's state by `steps`, and says so in the log and on standard error.

    Under `torchrun` every process rehearses its share, and the numbers of the first count.

    Raises:
        LoopQError: see `check_learns` and `fit`; or the checkpoint folder has the budget of another calibration.
    """
    state = get_state(graph_module)
    options, minutes = state.options, state.options.minutes
    assert minutes is not None
    check_learns(pipeline, minutes, state.run.calibration is not None)
    mark, file = "", None
    if options.checkpoint is not None:
        file = Path(options.checkpoint) / BUDGET_FILE
        batches = list(calibration_batches(state.run.calibration, state.signature, None))
        mark = fingerprint(dict(graph_module.state_dict()), state, batches, [f"{minutes:g} minutes"], 0)
    distributed.world(device_of(graph_module))
    budget = _agreed(_read(file, mark))
    if budget is None:
        budget = _agreed(_rehearsed(graph_module, pipeline))
        if file is not None and leads():
            write_text(file, json.dumps({"fingerprint": mark, **asdict(budget)}, indent=2))
    state.options = replace(rehearsal_options(options), steps=budget.steps)
    state.log.append(LogEntry(LOG_NAME, False, [budget.text]))
    remark(budget.text)


def _agreed(found: Any) -> Any:
    """What the first process found, in every process; raises it if it is an error."""
    found = distributed.first(found)
    if isinstance(found, LoopQError):
        raise found
    return found


def _rehearsed(graph_module: fx.GraphModule, pipeline: Pipeline) -> Budget | LoopQError:
    state, start = get_state(graph_module), time.perf_counter()
    assert state.scheme is not None and state.options.minutes is not None
    rank, size = distributed.world(device_of(graph_module))
    options, batches = share(rehearsal_options(state.options), list(state.run.calibration), rank, size)
    try:
        rehearsed = Rehearsal(graph_module, state.scheme, pipeline, batches, options).run()
        trim()
        rehearsed = replace(rehearsed, options=rehearsal_options(state.options))
        return fit(rehearsed, state.options.minutes, time.perf_counter() - start)
    except LoopQError as error:  # in one process only, perhaps: all have to hear of it
        return error


def share(
    options: CalibrationOptions, batches: Sequence[Any], rank: int, size: int
) -> tuple[CalibrationOptions, list[Any]]:
    """Options and batches with which one process does what falls to it among several: its rows of every step, and its
    part of the text that passes measure."""
    if size == 1:
        return options, list(batches)
    rows, tokens = max(1, options.batch_rows // size), max(1, options.statistics_tokens // size)
    return replace(options, batch_rows=rows, statistics_tokens=tokens), list(batches[rank::size] or batches)


def _read(file: Path | None, mark: str) -> Budget | LoopQError | None:
    """The budget of an earlier run; None if there was none."""
    if file is None or not file.exists():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        known, budget = found.pop("fingerprint"), Budget(**found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return LoopQError(f"{file} is damaged ({error}); delete it to choose the number of steps anew.")
    if known != mark:
        return LoopQError(
            f"{file} belongs to another calibration: model, data, scheme, method, options or minutes differ. Choose "
            "another checkpoint folder, or delete this one to start again."
        )
    return budget
