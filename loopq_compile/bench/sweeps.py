"""Figures 4 to 6 of the LoopQ paper: perplexity against selected groups, loops that run, and calibration samples; and
KL against the budget of calibration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from statistics import mean

from torch import fx

from loopq_compile.bench import plots
from loopq_compile.bench.cells import Values
from loopq_compile.bench.extrapolation import with_loops
from loopq_compile.bench.results import Report, spread
from loopq_compile.bench.settings import Run, Selection
from loopq_compile.bench.study import Study
from loopq_compile.bench.tables import failures, good
from loopq_compile.calibration.states import loop_ends
from loopq_compile.errors import LoopQError
from loopq_compile.evaluation.perplexity import Remembered, evaluate
from loopq_compile.graph.loops import get_tag
from loopq_compile.graph.scheme import Scheme
from loopq_compile.graph.state import get_state
from loopq_compile.methods import reference_graph
from loopq_compile.passes.quantize.annotate_linears import linear_calls
from loopq_compile.program import Program

GROUPS, SAMPLES = (0, 2, 4, 8), (8, 16, 32, 64, 128)
"""Default points of figures 4 and 6."""
STEPS = (20, 60, 180, 540)
"""Default points of `budget`."""
_SCORES = {"perplexity": ".3f", "ratio": ".3f", "kl": ".4f"}


def fig4(study: Study, selection: Selection) -> Report:
    """Perplexity against the number of groups with transforms and weights per loop."""
    total = _groups_in_loops(study, selection.schemes[0])

    def options(count: int) -> Values:
        return {"options": {"selection_budget": min(1.0, count / total)}}

    values = selection.values or GROUPS
    if not total or max(values) > total:
        raise LoopQError(f"{study.settings.model or 'The model'} has {total} groups in loops; --values asks for more.")
    report = _sweep("fig4", "selected groups", study, _only_loopq(selection), values, options)
    report.title = f"Perplexity by number of selected groups: {study.settings.model}"
    return report


def fig6(study: Study, selection: Selection) -> Report:
    """Perplexity against the number of calibration samples."""
    if 0 in selection.values:
        raise LoopQError("A method cannot be calibrated on 0 samples; --values takes numbers from 1 on.")
    report = _sweep("fig6", "samples", study, selection, selection.values or SAMPLES, lambda count: {"samples": count})
    report.title = f"Perplexity by number of calibration samples: {study.settings.model}"
    report.notes.append(f"Samples of {study.settings.sample_length} tokens ({study.settings.calibration}).")
    return report


def budget(study: Study, selection: Selection) -> Report:
    """KL to the model against the number of calibration steps, with the tokens and minutes that they take."""
    if 0 in selection.values:
        raise LoopQError("A method cannot be calibrated in 0 steps; --values takes numbers from 1 on.")
    steps = selection.values or STEPS
    by_steps = [selection.runs(options={"steps": count}) for count in steps]
    rows: list[Sequence[str]] = []
    lines: dict[str, plots.Line] = {}
    data = []
    for versions in zip(*by_steps, strict=True):  # one method and scheme, for every number of steps
        label = versions[0][0].setting
        points: list[tuple[int, float]] = []
        for count, runs in zip(steps, versions, strict=True):
            found = [study.measure(run) for run in runs]
            tokens = max((_tokens_learned(x) for x in good(found)), default=0)
            minutes = spread([x["calibration"]["seconds"] / 60 for x in good(found)], ".1f")
            cells = [spread([x[key] for x in good(found)], form) for key, form in _SCORES.items()]
            rows.append((label, str(count), f"{tokens:,}", minutes, *cells, failures(found)))
            data.append({"run": label, "steps": count, "tokens": tokens, "seeds": [_brief(x) for x in found]})
            points += [(tokens, mean(x["kl"] for x in good(found)))] if good(found) else []
        lines[label] = [x for x, _ in points], [y for _, y in points]
    return Report(
        "budget",
        f"Quality by budget of calibration: {study.settings.model}",
        ("run", "steps", "tokens", "minutes", "perplexity", "ratio", "KL to full precision", "note"),
        rows,
        {"full precision": study.full_precision(), "runs": data},
        lambda figure: plots.lines(figure.subplots(), lines, "calibration tokens", "KL to full precision"),
        notes=[f"Calibrated on {study.settings.calibration}; a text of fewer tokens is read several times."],
    )


def _tokens_learned(values: Values) -> int:
    return sum(int(phase.get("tokens", 0)) for phase in values["results"].get("calibration", ()))


def fig5(study: Study, selection: Selection) -> Report:
    """Perplexity against the number of loops that run, above and below the calibrated number."""
    compiled = _Loops(study, selection.schemes[0])
    counts = selection.values or range(1, 2 * len(compiled.ends) + 1)
    series = {"full precision": [compiled.model_score(count) for count in counts]}
    notes = [
        f"Compiled for {len(compiled.ends)} loops. Further ones repeat the last with its tables; the model itself is "
        "run the same way."
    ]
    for run in [runs[0] for runs in selection.runs()]:
        scores = [compiled.score(run, count) for count in counts]
        series[run.setting] = scores
        notes += [f"{run.setting}: {message}" for message in [failures(scores)] if message]
    perplexities = {name: [values.get("perplexity") for values in scores] for name, scores in series.items()}
    rows = [
        (name, *("" if value is None else f"{value:.3f}" for value in values)) for name, values in perplexities.items()
    ]
    lines = {name: (list(counts), values) for name, values in perplexities.items()}
    return Report(
        "fig5",
        f"Perplexity by number of loops: {study.settings.model}",
        ("run", *(f"{count} loops" for count in counts)),
        rows,
        {"loops": list(counts), "runs": series},
        lambda figure: plots.lines(figure.subplots(), lines, "loops", "perplexity", marks=[len(compiled.ends)]),
        notes=notes,
    )


def _only_loopq(selection: Selection) -> Selection:
    return Selection(("loopq",), selection.schemes, selection.seeds, selection.values)


def _groups_in_loops(study: Study, scheme: Scheme) -> int:
    """Groups of quantized linears that run more than once."""
    reference = reference_graph(study.captured, scheme)
    state = get_state(reference)
    return len(
        {
            state.sites[weight].group
            for weight, calls in linear_calls(reference.graph).items()
            if state.sites[weight].reason is None and state.loops.iterations(get_tag(calls[0])) > 1
        }
    )


def _sweep(
    name: str,
    what: str,
    study: Study,
    selection: Selection,
    values: Sequence[int],
    options: Callable[[int], Values],
) -> Report:
    """Perplexity of every run of the selection for every value."""
    by_value = [selection.runs(**options(value)) for value in values]
    base = study.full_precision()["perplexity"]
    rows: list[Sequence[str]] = [("full precision", "", f"{base:.3f}", "1.000", "", "")]
    lines: dict[str, plots.Line] = {}
    data = []
    for versions in zip(*by_value, strict=True):  # one method and scheme, for every value
        label = versions[0][0].setting
        means: list[float | None] = []
        for value, runs in zip(values, versions, strict=True):
            found = [study.measure(run) for run in runs]
            known = [x["perplexity"] for x in good(found) if x["perplexity"] is not None]
            means.append(mean(known) if known else None)
            cells = [spread([x[key] for x in good(found)], ".3f") for key in ("perplexity", "ratio")]
            kl = spread([x["kl"] for x in good(found)], ".4f")
            rows.append((label, str(value), *cells, kl, failures(found)))
            data.append({"run": label, what: value, "seeds": [_brief(x) for x in found]})
        lines[label] = (list(values), means)
    return Report(
        name,
        "",
        ("run", what, "perplexity", "ratio", "KL to full precision", "note"),
        rows,
        {"full precision": base, "runs": data},
        lambda figure: plots.lines(figure.subplots(), lines, what, "perplexity", log=False),
    )


def _brief(values: Values) -> Values:
    selected = values.get("results", {}).get("slt", {}).get("selected")
    kept: Values = {key: values[key] for key in ("perplexity", "ratio", "kl", "agreement", "error") if key in values}
    return {**kept, "selected": selected} if selected is not None else kept


class _Loops:
    """Scores of a study's model and programs with other numbers of loops."""

    def __init__(self, study: Study, scheme: Scheme) -> None:
        self.study = study
        self.reference = reference_graph(study.captured, scheme)
        self.ends = loop_ends(self.reference)
        if len(self.ends) < 2:
            raise LoopQError(
                f"{study.settings.model or 'The model'} has no loop that hands one state on from loop to loop; the "
                "number of its loops cannot be changed in the graph."
            )
        self._program: tuple[str, Program] | None = None
        self.teacher = cache(lambda count: Remembered(self._with(self.reference, count)))

    def model_score(self, count: int) -> Values:
        """The score of the full-precision model."""
        about = {"kind": "loops of the model", "loops": count, **self.study.window}
        tokens = self.study.tokens
        return self.study.cell(
            f"full precision {count} loops",
            about,
            lambda: evaluate(self.teacher(count), tokens, **self.study.window).to_dict(),
        )

    def score(self, run: Run, count: int) -> Values:
        """The score of a program compiled for the model's own number; the teacher runs the same number of loops."""

        def measure() -> Values:
            if self._program is None or self._program[0] != str(run):  # only the latest is kept: programs are large
                self._program = str(run), self.study.program(run)
            program = self._with(self._program[1].graph_module, count)
            return evaluate(program, self.study.tokens, teacher=self.teacher(count), **self.study.window).to_dict()

        about = {**self.study.describe(run), "kind": "loops", "loops": count}
        try:
            return self.study.cell(f"{run} {count} loops", about, measure)
        except LoopQError as error:
            return {"error": str(error)}

    def _with(self, graph_module: fx.GraphModule, count: int) -> Program:
        return Program(with_loops(graph_module, self.ends, count))
