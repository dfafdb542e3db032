"""The numbers of a report, as plain values: from the program only, and from its model and held-out tokens."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, fx, nn

from loopq_compile.analysis import parameters, residual_error
from loopq_compile.analysis.summary import activation_rows
from loopq_compile.calibration.batches import bind_batch
from loopq_compile.capture.to_graph import capture
from loopq_compile.errors import LoopQError
from loopq_compile.evaluation.perplexity import logits_caller
from loopq_compile.generation.sampling import generate
from loopq_compile.generation.text_program import TextProgram
from loopq_compile.graph.device import device_of, place
from loopq_compile.graph.evaluate import values_of
from loopq_compile.graph.loops import get_tag
from loopq_compile.graph.scheme import Scheme
from loopq_compile.graph.state import get_state
from loopq_compile.graph.texts import text_inputs
from loopq_compile.graph.weights import site_calls
from loopq_compile.methods import reference_graph

WORST = 12
CONTEXT = 8
PEAK = 0.999
"""Share of entries inside what counts as a group's range."""
Values = dict[str, Any]


def measure(
    program: TextProgram,
    model: nn.Module | None = None,
    tokens: Sequence[Tensor] = (),
    *,
    tokenizer: Any = None,
    samples: int = 2,
) -> Values:
    """All numbers of a report on one program.

    Args:
        program: the quantized program.
        model: the model it was compiled from. Without it, or without tokens, errors are left out.
        tokens: held-out token ids, `[batch, sequence]` each; a few hundred are enough.
        tokenizer: tokenizer of the `tokenizers` library, to show text instead of token ids.
        samples: how many continuations of the model and of the program to show; 0 for none.

    Returns:
        Plain values by topic, for `render`.

    Raises:
        LoopQError: the program takes more than token ids, or they do not fit.
    """
    state = get_state(program.graph_module)
    known = {group: rows.tolist() for group, rows in activation_rows(program.graph_module).items()}
    order = dict.fromkeys(site.group for site in state.sites.values())
    ranges = {group: known[group] for group in order if group in known}
    found: Values = {
        "about": {
            "model": state.model_name,
            "loops": state.loops.describe(),
            "scheme": state.scheme.name if state.scheme else "",
            "activation": state.scheme.activation if state.scheme else "",
            "method": state.method,
            "count": state.loops.count,
        },
        "ranges": ranges,
        "curve": _curve(state.results),
        "selected": _selected(state.results),
        "passes": [asdict(entry) for entry in state.log],
    }
    if model is None or not tokens:
        return found
    captured = capture(model, text_inputs(state.signature, tokens[0]))
    place(captured, device_of(program.graph_module))
    found["parameters"] = parameters.by_part(captured, program.graph_module)
    with torch.no_grad():
        found |= _compare(program, captured, tokens)
        found["fidelity"], found["worst"] = _predictions(program, model, tokens, tokenizer)
        found["samples"] = [_sample(program, model, row, tokenizer) for row in _rows(tokens)[:samples]]
    return found


def _compare(program: TextProgram, captured: fx.GraphModule, tokens: Sequence[Tensor]) -> Values:
    reference = reference_graph(captured, program.scheme or Scheme())
    where = residual_error.points(reference)
    errors = residual_error.errors(reference, program.graph_module, where, tokens)
    points = [{**asdict(point), "error": errors[point.node]} for point in where if point.node in errors]
    modules: dict[str, dict[int, float]] = defaultdict(dict)
    for point in points:
        if point["kind"] == "linear" and point["loop"] is not None:
            modules[point["site"]][point["loop"]] = point["error"]
    return {
        "points": [point for point in points if point["kind"] == "state"] or points,
        "modules": {site: [row.get(t) for t in range(program.loops.count)] for site, row in modules.items()},
        "carry": carry(reference, program.graph_module, tokens[0]),
        "drift": drift(reference, tokens[0]),
    }


def carry(reference: fx.GraphModule, program: fx.GraphModule, batch: Tensor) -> list[Values]:
    """The error of the state that every loop passes to the next, and where it comes from (proposition 2).

    The program runs twice: freely, and with the model's own state inserted at every loop transition. The error of the
    second run at the end of loop t is made in loop t; the difference between the two runs is inherited.

    Args:
        reference: the model's graph with loop tags; node names are those of the program.
        program: the program's graph.
        batch: token ids `[batch, sequence]`.

    Returns:
        By transition `{"loop", "cosine", "total", "local", "inherited"}`, errors relative to the norm of the state;
        empty if the program has no transitions, or has other nodes there.
    """
    edges = get_state(reference).loops.boundaries
    names = [edge.state[-1] for edge in edges]
    here = {node.name for node in program.graph.nodes}
    if not set(names) <= here:
        return []
    inputs = bind_batch(batch, get_state(program).signature, device=device_of(program))
    exact, free = (values_of(graph_module, inputs, names) for graph_module in (reference, program))
    forced = values_of(program, inputs, names, exact)
    rows = []
    for edge, name in zip(edges, names, strict=True):
        y, x, made = (values[name].float() for values in (exact, free, forced))
        norm = float(y.norm()) or 1.0
        cosine = float(nn.functional.cosine_similarity(x, y, dim=-1).mean())
        total, local = float((x - y).norm()) / norm, float((made - y).norm()) / norm
        inherited = float((x - made).norm()) / norm
        rows.append({"loop": edge.source, "cosine": cosine, "total": total, "local": local, "inherited": inherited})
    return rows


def drift(reference: fx.GraphModule, batch: Tensor) -> dict[str, Values]:
    """How the input of a group changes from loop to loop, in full precision (proposition 1).

    Args:
        reference: the model's graph with loops and linears.
        batch: token ids `[batch, sequence]`.

    Returns:
        By group `{"peak": [...], "scale": [...], "covariance": [...]}` with an entry per loop: the magnitude that one
        entry in a thousand exceeds; the root mean square relative to its mean over loops; and `|C_t - C_0| / |C_0|`
        (Frobenius) of second moments divided by their traces.
    """
    nodes: dict[str, dict[int, str]] = defaultdict(dict)
    for site, linears in site_calls(reference):
        for linear in linears:
            tag, x = get_tag(linear), linear.args[0]
            if tag is not None and tag.loops == (0,) and isinstance(x, fx.Node):
                nodes[site.group][tag.index[0]] = x.name
    names = {name for rows in nodes.values() for name in rows.values()}
    values = values_of(reference, bind_batch(batch, get_state(reference).signature, device=device_of(reference)), names)
    found = {}
    for group, rows in nodes.items():
        flat = [values[rows[t]].float().flatten(0, -2) for t in sorted(rows)]
        peaks = [float(x.abs().flatten().kthvalue(math.ceil(PEAK * x.numel())).values) for x in flat]
        sizes = [float(x.square().mean().sqrt()) for x in flat]
        mean = sum(sizes) / len(sizes) or 1.0
        unit = [x / (float(x.norm()) or 1.0) for x in flat]  # second moments of trace 1
        first = _inner(unit[0], unit[0])
        distances = [first + _inner(x, x) - 2 * _inner(unit[0], x) for x in unit]
        covariance = [math.sqrt(max(0.0, d) / first) if first else 0.0 for d in distances]
        found[group] = {"peak": peaks, "scale": [size / mean for size in sizes], "covariance": covariance}
    return found


def _inner(x: Tensor, y: Tensor) -> float:
    """`<XᵀX, YᵀY>` without forming either: `|X Yᵀ|²`."""
    return float((x @ y.T).square().sum())


def _rows(tokens: Sequence[Tensor]) -> list[Tensor]:
    return [row.unsqueeze(0) for batch in tokens for row in batch]


def _predictions(
    program: TextProgram, model: nn.Module, tokens: Sequence[Tensor], tokenizer: Any
) -> tuple[Values, list[Values]]:
    """How far predictions moved, over all tokens, and the tokens where they moved most (KL divergence, in nats)."""
    found: list[Values] = []
    total, agreed, count = 0.0, 0, 0
    exact, quantized = logits_caller(model), logits_caller(program)
    for row in _rows(tokens):
        y, x = (read(row).log_softmax(-1)[0] for read in (exact, quantized))
        divergence = (y.exp() * (y - x)).sum(-1)
        total, count = total + float(divergence.sum()), count + len(divergence)
        agreed += int((y.argmax(-1) == x.argmax(-1)).sum())
        for position in divergence.topk(min(WORST, len(divergence))).indices.tolist():
            found.append(
                {
                    "kl": float(divergence[position]),
                    "context": _text(row[0, max(0, position + 1 - CONTEXT) : position + 1], tokenizer),
                    "model": _text(y[position].argmax().view(1), tokenizer),
                    "program": _text(x[position].argmax().view(1), tokenizer),
                }
            )
    fidelity = {"tokens": count, "kl": total / count, "agreement": agreed / count}
    return fidelity, sorted(found, key=lambda entry: -entry["kl"])[:WORST]


def _sample(program: TextProgram, model: nn.Module, row: Tensor, tokenizer: Any, new: int = 24) -> Values:
    prompt = row[:, : max(1, min(16, row.shape[1] // 2))]
    texts = {
        name: _text(generate(run, prompt, new)[0, prompt.shape[1] :], tokenizer)
        for name, run in (("model", model), ("program", program))
    }
    return {"prompt": _text(prompt[0], tokenizer), **texts}


def _text(ids: Tensor, tokenizer: Any) -> str:
    return tokenizer.decode(ids.tolist()) if tokenizer is not None else " ".join(map(str, ids.tolist()))


def _curve(results: Values) -> list[list[Values]]:
    """By phase of calibration, the steps and the divergence on held-out batches."""
    phases = [phase.get("curve", []) for phase in results.get("calibration", [])]
    return [
        [{"step": entry["step"], "validation": entry.get("validation")} for entry in phase if "step" in entry]
        for phase in phases
        if phase
    ]


def _selected(results: Values) -> Values:
    slt = results.get("slt") or {}
    return {"groups": list(slt.get("selected", ())), "scores": list(slt.get("scores", ()))}


def check_names(programs: Sequence[str]) -> None:
    """Refuses two programs of one name.

    Raises:
        LoopQError: two have one name; the message gives it.
    """
    for name in programs:
        if list(programs).count(name) > 1:
            raise LoopQError(f"Two programs in one report are called {name!r}; give them different names.")
