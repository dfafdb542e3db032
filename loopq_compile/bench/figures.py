"""Figures 1 to 3 of the LoopQ paper: ranges by loop, errors along the trajectory, groups with their own transforms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from loopq_compile.analysis.summary import short_names
from loopq_compile.bench import plots
from loopq_compile.bench.cells import Values
from loopq_compile.bench.results import Report
from loopq_compile.bench.settings import Run, Selection
from loopq_compile.bench.study import Study
from loopq_compile.calibration.ranges import static_range
from loopq_compile.errors import LoopQError
from loopq_compile.graph.scheme import Scheme
from loopq_compile.graph.state import copy_graph, get_state
from loopq_compile.passes.loops.tag_loops import TagLoops
from loopq_compile.passes.quantize.annotate_linears import AnnotateLinears
from loopq_compile.passes.quantize.canonicalize_linears import CanonicalizeLinears
from loopq_compile.passes.quantize.collect_ranges import CollectRanges
from loopq_compile.pipeline import Pipeline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PERCENTILE = 99.0


def fig1(study: Study, selection: Selection) -> Report:
    """Why loops are hard: activation ranges differ from loop to loop, and errors grow along the trajectory."""
    ranges: dict[str, list[float]] = study.cell(
        "ranges", _range_settings(study, selection.schemes[0]), lambda: _ranges(study, selection.schemes[0])
    )
    if not ranges:
        raise LoopQError(f"{study.settings.model or 'The model'} has no loop; figure 1 compares loops.")
    normal = {group: [value / (sum(values) / len(values)) for value in values] for group, values in ranges.items()}
    count = max(map(len, normal.values()))
    errors, notes = _trajectories(study, selection)

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        even = {group: values for group, values in normal.items() if len(values) == count}
        loops = [str(i) for i in range(count)]
        plots.heat(
            figure,
            left,
            list(even.values()),
            short_names(list(even)),
            loops,
            "99th percentile / mean over loops",
        )
        left.set_xlabel("loop")
        _draw_errors(right, errors)

    rows = [
        (
            group,
            *(f"{value:.3f}" for value in values),
            *[""] * (count - len(values)),
            f"{max(values) / min(values):.2f}",
        )
        for group, values in normal.items()
    ]
    return Report(
        "fig1",
        f"Activation ranges by loop, and growth of errors: {study.settings.model}",
        ("group", *(f"loop {i}" for i in range(count)), "largest / smallest"),
        rows,
        {"ranges": ranges, "normalised": normal, "errors": errors},
        draw,
        notes=["99th percentile of magnitudes that a group's linears read, divided by its mean over loops.", *notes],
    )


def fig2(study: Study, selection: Selection) -> Report:
    """Layer-wise relative error along the whole unrolled trajectory, per method."""
    errors, notes = _trajectories(study, selection)
    labels = list(dict.fromkeys(label for points in errors.values() for label in _by_loop(points)))
    rows = []
    for name, found in errors.items():
        ends = _by_loop(found)
        values = [point["error"] for point in found]
        mean = f"{sum(values) / len(values):.4f}" if values else ""
        rows.append((name, *(f"{ends[label]:.4f}" if label in ends else "" for label in labels), mean))
    return Report(
        "fig2",
        f"Relative error along the trajectory: {study.settings.model}",
        ("run", *labels, "mean"),
        rows,
        errors,
        (lambda figure: _draw_errors(figure.subplots(), errors)) if errors else None,
        notes=[
            "Mean over tokens of |error| / |state| of the residual stream where a loop, or what lies before and behind "
            "it, ends.",
            *notes,
        ],
    )


def fig3(study: Study, selection: Selection) -> Report:
    """Scores by which LoopQ chooses the groups that get separate transforms, and the groups that it chose."""
    run = Run("loopq", selection.schemes[0], selection.seeds[0])
    values = study.measure(run)
    if "error" in values:
        raise LoopQError(values["error"])
    slt = values["results"].get("slt")
    if not slt or not slt.get("scores"):
        raise LoopQError(f"{run} noted no scores of groups; this version of the method selects none.")
    rounds: list[Mapping[str, float]] = slt["scores"]
    selected: list[str] = list(slt.get("selected", ()))
    groups = list(dict.fromkeys(group for scores in rounds for group in scores))
    largest = [max(scores.values(), default=0.0) or 1.0 for scores in rounds]
    values_by_group = [[scores.get(g, 0.0) / top for scores, top in zip(rounds, largest, strict=True)] for g in groups]
    rows = [
        (group, "yes" if group in selected else "", *(f"{s[group]:.4g}" if group in s else "" for s in rounds))
        for group in groups
    ]

    def draw(figure: Figure) -> None:
        marked = [(groups.index(g), len(rounds) - 1) for g in selected if g in groups]
        axes = figure.subplots()
        names = [f"round {i + 1}" for i in range(len(rounds))]
        plots.heat(
            figure,
            axes,
            values_by_group,
            short_names(groups),
            names,
            "score / largest of the round (x: selected)",
            marked,
        )

    return Report(
        "fig3",
        f"Groups with transforms per loop: {study.settings.model}",
        ("group", "selected", *(f"score, round {i + 1}" for i in range(len(rounds)))),
        rows,
        slt,
        draw,
        text_columns=2,
    )


def _range_settings(study: Study, scheme: Scheme) -> Values:
    return {**study.describe(Run("ranges", _static(scheme))), "kind": "ranges"}


def _static(scheme: Scheme) -> Scheme:
    """The scheme with static ranges, so that ranges are measured under any scheme."""
    return replace(scheme, activation="static", activation_bits=min(scheme.activation_bits, 8))


def _ranges(study: Study, scheme: Scheme) -> Values:
    """The percentile of each iteration, by group inside a loop."""
    graph_module = copy_graph(study.captured)
    state = get_state(graph_module)
    state.scheme, state.run.calibration = _static(scheme), study.batches()
    Pipeline([TagLoops(), CanonicalizeLinears(), AnnotateLinears(), CollectRanges()]).run(graph_module)
    found = {}
    for group, rows in state.run.statistics.items():
        if len(rows) > 1:
            pooled = [rows[row].pooled() for row in sorted(rows)]
            found[group] = [float(static_range(x, 8, "percentile", PERCENTILE)) for x in pooled]
    return found


def _trajectories(study: Study, selection: Selection) -> tuple[dict[str, list[Values]], list[str]]:
    """The points of the residual stream by run (outputs of linears if a model has none), and failures."""
    errors, notes = {}, []
    for run in [runs[0] for runs in selection.runs()]:
        values = study.measure(run)
        if "error" in values:
            notes.append(f"{run.setting}: {values['error']}")
            continue
        points = values["trajectory"]
        errors[run.setting] = [point for point in points if point["kind"] == "state"] or points
    return errors, notes


def _by_loop(found: Sequence[Values]) -> dict[str, float]:
    """The last error before the loops, in each loop, and after them."""
    ends: dict[str, float] = {}
    inside = False
    for point in found:
        inside |= point["loop"] is not None
        label = f"loop {point['loop']}" if point["loop"] is not None else ("behind" if inside else "before")
        ends[label] = point["error"]
    return ends


def _draw_errors(axes: Any, errors: Mapping[str, Sequence[Values]]) -> None:
    series, marks = {}, []
    for name, found in errors.items():
        series[name] = (list(range(len(found))), [point["error"] or None for point in found])
        loops = [point["loop"] for point in found]
        marks = [i - 0.5 for i in range(1, len(loops)) if loops[i] != loops[i - 1]]
    plots.lines(axes, series, "point of the residual stream (dotted: new loop)", "relative error", marks=marks)
