"""Model cards: a `README.md` beside what was written, with the header that the Hugging Face hub reads.

A card that somebody changed is theirs and stays: the last line of ours holds the SHA-256 of what is above it. Cards are
in no manifest, so that changing one damages nothing.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from loopq_compile._version import __version__
from loopq_compile.graph.state import CompilerState, Figure
from loopq_compile.processes import leads
from loopq_compile.storage.atomic import real_path, write_text
from loopq_compile.storage.recipes import RECIPES

CARD_FILE = "README.md"
_MARK = "<!-- Written by loopq_compile; sha256 of the lines above: {}. A changed card is never replaced. -->\n"
_OURS = re.compile(r"(?s)(.*)<!-- Written by loopq_compile; sha256 of the lines above: ([0-9a-f]{64})\. [^\n]*-->\s*")
_MOST = 6
"""Names that a card lists before it counts the rest."""


def write_card(directory: str | os.PathLike[str], state: CompilerState, kind: str, tags: Iterable[str] = ()) -> None:
    """Writes the model card of an output folder. A `README.md` that is not an unchanged card of ours stays.

    Args:
        directory: the folder.
        state: of the program that was written.
        kind: a key of `loopq_compile.storage.recipes.RECIPES`.
        tags: further tags for the hub.

    Raises:
        LoopQError: the folder cannot be written.
    """
    folder = real_path(directory)
    if leads() and all(_is_ours(path) for path in folder.iterdir() if path.name.lower() == CARD_FILE.lower()):
        text = card_text(state, kind, tags)
        write_text(folder / CARD_FILE, text + _MARK.format(_digest(text)))


def card_text(state: CompilerState, kind: str, tags: Iterable[str] = ()) -> str:
    """The card: header, what was quantized how, how to run it in each engine, what the passes measured."""
    from huggingface_hub import ModelCard, ModelCardData

    recipe = RECIPES[kind]
    facts = {"scheme": state.scheme.name, "method": state.method} if state.scheme else {}
    more: dict[str, Any] = {"quantized_by": "loopq_compile"}
    more |= {"base_model_relation": "quantized"} if state.origin.hub_id else {}
    more |= {"quantization": facts} if facts else {}
    if state.figures:
        name = state.origin.hub_id or state.model_name
        more |= {"model_name": name, "eval_results": [_result(figure) for figure in state.figures]}
    data = ModelCardData(
        base_model=state.origin.hub_id or None,
        library_name=recipe.library,
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys([*recipe.tags, "loopq", *(["quantized"] if facts else []), *tags])),
        **more,
    )
    title = f"{state.origin.hub_id or state.model_name}{f' in {state.scheme.name}' if state.scheme else ''}"
    parts = [f"# {title}, as {recipe.what}", _facts(state), "## How to run it"]
    parts += [f"{engine}:\n\n{code}" for engine, code in recipe.engines.items()]
    parts += ["## Evaluation", _evaluation(state), "## What the passes reported", _log(state)]
    return str(ModelCard(f"---\n{data.to_yaml().strip()}\n---\n\n" + "\n\n".join(parts) + "\n\n"))


def _facts(state: CompilerState) -> str:
    rows = {"model": f"`{state.model_name}`, {state.loops.describe()}"}
    if state.origin.hub_id:
        rows["base model"] = f"[{state.origin.hub_id}](https://huggingface.co/{state.origin.hub_id})"
    scheme = state.scheme
    if scheme is not None:
        group = "whole rows" if scheme.group_size == -1 else f"groups of {scheme.group_size}"
        inputs = f"{scheme.activation_bits}-bit activations, {scheme.activation} scales"
        inputs = inputs if scheme.quantizes_activations else "activations in floating point"
        rows["scheme"] = f"`{scheme.name}`: {scheme.weight_bits}-bit weights in {group}, {inputs}"
        rows["method"] = f"`{state.method}`"
        done = [site for site in state.sites.values() if site.reason is None]
        weights = sum(math.prod(site.shape) for site in done)
        rows["quantized"] = f"{len(done)} linear layers, {weights:,} weights"
        kept = Counter(f"{site.name} ({site.reason})" for site in state.sites.values() if site.reason is not None)
        names = [*list(kept)[:_MOST], *([f"{len(kept) - _MOST} more"] if len(kept) > _MOST else [])]
        rows["in floating point"] = "; ".join(names) or "no linear layer"
    rows["written by"] = f"loopq_compile {__version__}"
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {_cell(value)} |" for name, value in rows.items())])


def _log(state: CompilerState) -> str:
    """Notes of the passes, calibration losses included."""
    lines = [f"- `{entry.pass_name}`: {_cell('; '.join(entry.notes))}" for entry in state.log if entry.notes]
    return "\n".join(lines or ["Nothing."])


def _evaluation(state: CompilerState) -> str:
    """The saved figures; they are the program's own, whatever was made of it."""
    if not state.figures:
        return "Not measured. `loopq-compile eval MODEL DIR --save` on the program writes figures here."
    rows = [
        f"| {_cell(x.data)} | {_cell(x.metric)} | {x.value:.4g} | {_cell(x.details)} |"
        for x in sorted(state.figures, key=lambda x: (x.data, x.details))
    ]
    head = ["| measured on | metric | value | how |", "| --- | --- | ---: | --- |"]
    return "\n".join([*head, *rows, "", "Of the program, in PyTorch; an engine that rounds on its own may differ."])


def _result(figure: Figure) -> Any:
    """A figure as the hub shows it."""
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type="text-generation",
        dataset_type=re.sub(r"\W+", "-", figure.data).strip("-").lower() or "text",
        dataset_name=figure.data,
        metric_type=re.sub(r"\W+", "_", figure.metric).strip("_").lower(),
        metric_name=figure.metric,
        metric_value=figure.value,
        dataset_args={"how": figure.details},
    )


def _cell(value: Any) -> str:
    return str(value).replace("|", r"\|").replace("\n", " ").replace("<", "&lt;")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _is_ours(path: Path) -> bool:
    """Whether a file is a card of ours that nobody changed."""
    if path.name != CARD_FILE or path.is_symlink() or not path.is_file():
        return False
    found = _OURS.fullmatch(path.read_text(encoding="utf-8", errors="replace"))
    return found is not None and _digest(found[1]) == found[2]
