"""Tables 1, 2 and 5 of the LoopQ paper (methods by schemes, an ablation, parameters and memory), and one of weight
solvers."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

from loopq_compile.bench import plots
from loopq_compile.bench.cells import Values
from loopq_compile.bench.results import Report, spread
from loopq_compile.bench.settings import Run, Selection
from loopq_compile.bench.study import Study
from loopq_compile.graph.options import SOLVERS

METHODS = ("symmetric", "smoothquant", "quarot", "spinquant", "flatquant", "flatquant-e2e", "loopq-paper", "loopq")
"""All methods of table 1, simplest first."""
PARTS_OF_LOOPQ = ("las", "slt", "cta", "trajectory")
ABLATIONS: dict[str, dict[str, bool]] = {
    "loopq": {},
    "without LAS": {"las": False},
    "without SLT": {"slt": False},
    "without CTA": {"cta": False},
    "without trajectory loss": {"trajectory": False},
    "without learned rounding": {"rounding": False},
    "LAS alone": {"slt": False, "cta": False, "trajectory": False},
    "without all four": dict.fromkeys(PARTS_OF_LOOPQ, False),
}
"""Rows of table 2: arguments of `loopq_compile.methods.loopq`."""
QUALITY = ("perplexity", "ratio", "KL to full precision", "top-1 agreement")


def table1(study: Study, selection: Selection) -> Report:
    """Methods by schemes: perplexity, distance to the model, cost of calibration."""
    columns = ("method", "scheme", "scales", *QUALITY, "calibration tokens", "steps", "calibrate s", "peak GiB", "note")
    measured = [(runs[0], [study.measure(run) for run in runs]) for runs in selection.runs()]
    rows = [_base_row(study, len(columns))]
    rows += [(*_setting(run), *_quality(found), *_cost(found), failures(found)) for run, found in measured]
    return Report(
        "table1",
        f"Methods by schemes: {study.settings.model}",
        columns,
        rows,
        _data(study, measured),
        lambda figure: plots.bars(figure, _perplexities(measured), "perplexity", study.full_precision()["perplexity"]),
        text_columns=3,
        notes=_notes(study),
    )


def table2(study: Study, selection: Selection) -> Report:
    """Ablation of LoopQ: the value of each of its parts."""
    rows = [("loopq", {"flags": flags, "label": label}) for label, flags in ABLATIONS.items()]
    return _variants(study, selection, "table2", "Ablation of LoopQ", rows)


def solvers(study: Study, selection: Selection) -> Report:
    """Ways to choose the integers of weights, without and after transforms; learned rounding comes last.

    The selection's methods are "symmetric", for only the solvers, and "loopq", which learns the rounding.
    """
    rows: list[tuple[str, dict[str, Any]]] = []
    for flags, suffix in (({}, ""), ({"transforms": True}, " behind transforms")):
        for solver in SOLVERS:
            options = {"weight_solver": solver}
            rows.append(("symmetric", {"flags": flags, "options": options, "label": solver + suffix}))
    rows += [("loopq", {"flags": {"transforms": False}, "label": "loopq without transforms"}), ("loopq", {})]
    chosen = [(method, arguments) for method, arguments in rows if method in selection.methods]
    return _variants(study, selection, "solvers", "Weight solvers", chosen)


def _variants(
    study: Study, selection: Selection, name: str, title: str, rows: Sequence[tuple[str, dict[str, Any]]]
) -> Report:
    """A table with a row for every method and its arguments of `Run`, for every scheme."""
    columns = ("variant", "scheme", "scales", *QUALITY, "calibrate s", "note")
    measured = []
    for scheme in selection.schemes:
        for method, arguments in rows:
            runs = [Run(method, scheme, seed, **arguments) for seed in selection.seeds]
            measured.append((runs[0], [study.measure(run) for run in runs]))
    lines = [_base_row(study, len(columns))]
    lines += [(*_setting(run), *_quality(found), _cost(found)[2], failures(found)) for run, found in measured]
    return Report(
        name,
        f"{title}: {study.settings.model}",
        columns,
        lines,
        _data(study, measured),
        lambda figure: plots.bars(figure, _perplexities(measured), "perplexity", study.full_precision()["perplexity"]),
        text_columns=3,
        notes=_notes(study),
    )


def table5(study: Study, selection: Selection) -> Report:
    """Parameters and memory of programs by part, and the share of loop-dependent parameters."""
    columns = ("method", "scheme", "part", "parameters", "MiB", "MiB as stored")
    rows: list[Sequence[str]] = []
    found: list[tuple[Run, Values]] = []
    notes = ["`MiB` counts floating point with 16 bits, as models are deployed; `as stored` is what the program holds."]
    for run in [runs[0] for runs in selection.runs()]:
        values = study.measure(run)
        if "error" in values:
            notes.append(f"{run.setting}: {values['error']}")
            continue
        parts = values["parameters"]
        found.append((run, parts))
        if len(rows) == 0:
            rows.append(_part_row("full precision", "", "model", parts["model"]))
        every = {**parts["parts"], "total": _total(parts["parts"])}
        rows += [_part_row(run.name, run.scheme.name, name, part) for name, part in every.items() if part["count"]]
        notes.append(
            f"{run.setting}: loop-dependent parameters are {parts['share']:.3f} % of the model's, "
            f"{parts['share with copies']:.3f} % with the weights that single loops have for themselves."
        )
    memory = {run.setting: {name: x["deployed"] / 2**20 for name, x in v["parts"].items()} for run, v in found}
    return Report(
        "table5",
        f"Parameters and memory: {study.settings.model}",
        columns,
        rows,
        [{"run": run.setting, **parts} for run, parts in found],
        (lambda figure: plots.stacked(figure, memory, "MiB, floating point in 16 bits")) if memory else None,
        text_columns=3,
        notes=notes,
    )


def failures(found: Sequence[Values]) -> str:
    """What went wrong; "" if nothing did."""
    errors = [values["error"] for values in found if "error" in values]
    if not errors:
        return ""
    return errors[0] if len(errors) == len(found) else f"{len(errors)} of {len(found)} seeds failed: {errors[0]}"


def good(found: Sequence[Values]) -> list[Values]:
    """The values that were measured without error."""
    return [values for values in found if "error" not in values]


def _setting(run: Run) -> tuple[str, str, str]:
    return run.name, run.scheme.name, run.scheme.activation if run.scheme.quantizes_activations else ""


def _quality(found: Sequence[Values]) -> list[str]:
    forms = {"perplexity": ".3f", "ratio": ".3f", "kl": ".4f", "agreement": ".2%"}
    return [spread([values[name] for values in good(found)], form) for name, form in forms.items()]


def _cost(found: Sequence[Values]) -> list[str]:
    costs = [values["calibration"] for values in good(found)]
    if not costs:
        return [""] * 4
    peaks = [cost["peak bytes"] for cost in costs if cost["peak bytes"]]
    return [
        f"{costs[0]['tokens']:,}",
        str(costs[0]["steps"] or ""),
        f"{mean(cost['seconds'] for cost in costs):.1f}",
        f"{max(peaks) / 2**30:.2f}" if peaks else "",
    ]


def _base_row(study: Study, columns: int) -> Sequence[str]:
    row = ["full precision", "", "", f"{study.full_precision()['perplexity']:.3f}", "1.000"]
    return row + [""] * (columns - len(row))


def _part_row(method: str, scheme: str, name: str, part: Values) -> Sequence[str]:
    stored = f"{part['stored'] / 2**20:.3f}" if "stored" in part else ""
    return method, scheme, name, f"{part['count']:,}", f"{part['deployed'] / 2**20:.3f}", stored


def _total(parts: Values) -> Values:
    return {name: sum(part[name] for part in parts.values()) for name in ("count", "stored", "deployed")}


def _perplexities(measured: Sequence[tuple[Run, list[Values]]]) -> dict[str, dict[str, float | None]]:
    series: dict[str, dict[str, float | None]] = {}
    for run, found in measured:
        known = [values["perplexity"] for values in good(found) if values["perplexity"] is not None]
        name, scheme, activation = _setting(run)
        series.setdefault(f"{scheme} {activation}", {})[name] = mean(known) if known else None
    return series


def _data(study: Study, measured: Sequence[tuple[Run, list[Values]]]) -> Values:
    """Numbers by run, without data of other reports."""
    rows = []
    for run, found in measured:
        name, scheme, activation = _setting(run)
        seeds = [{k: v for k, v in values.items() if k not in ("trajectory", "results")} for values in found]
        rows.append({"method": name, "scheme": scheme, "scales": activation, "seeds": seeds})
    return {"full precision": study.full_precision(), "runs": rows}


def _notes(study: Study) -> list[str]:
    tokens = study.full_precision()["tokens"]
    settings = study.settings
    return [
        f"{tokens:,} tokens scored of {settings.text or 'the text'}, windows of {settings.length}, stride "
        f"{settings.stride}; calibrated on {settings.samples} x {settings.sample_length} tokens "
        f"({settings.calibration})."
    ]
