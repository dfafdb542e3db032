"""`loopq-compile eval`."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loopq_compile.cli.common import (
    AllowPickle,
    Device,
    Dtype,
    ExitThreshold,
    Json,
    Length,
    MaxTokens,
    RepeatLayers,
    Stride,
    TextFile,
    TokenizerFile,
    TrustRemoteCode,
    console,
    load,
    names,
    print_json,
    table,
    text_source,
)
from loopq_compile.errors import LoopQError

if TYPE_CHECKING:
    from loopq_compile.graph.state import Figure
    from loopq_compile.sources.loading import Loaded

COLUMNS = ("model", "kind", "perplexity", "nll", "KL to first", "top-1 agreement", "tokens", "seconds")


def eval_command(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help='One or more: "bundled", "smollm2", Hugging Face folders or ids, program folders, .onnx files.',
        ),
    ],
    text: TextFile = None,
    length: Length = 256,
    stride: Stride = 128,
    max_tokens: MaxTokens = 16384,
    repeat: RepeatLayers = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Run tasks of lm-eval instead of a text: hellaswag,winogrande,arc_challenge,lambada_openai,mmlu,"
            "wikitext, or YAML files of your own, comma-separated. Needs the extra `eval`.",
        ),
    ] = None,
    task_folder: Annotated[
        str | None, typer.Option("--task-folder", metavar="DIR", help="Folder with YAML files of further tasks.")
    ] = None,
    fewshot: Annotated[int | None, typer.Option(min=0, help="Examples before a task's questions.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of every task; all by default.")] = None,
    tokenizer: TokenizerFile = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    dtype: Dtype = "float32",
    device: Device = "auto",
    exit_threshold: ExitThreshold = None,
    save: Annotated[
        bool, typer.Option("--save", help="Keep the figures in the folders of programs, for their model cards.")
    ] = False,
    json: Json = False,
) -> None:
    """Measure perplexity (lower is better): how well models predict a text.

    Windows of LENGTH tokens slide over the text by STRIDE. In each, only the new tokens are scored, so that every token
    has context and counts once. With several models, the others are also compared with the first one: KL
    divergence of their predictions per token, and how often they rank the same token first.

    Example: loopq-compile eval bundled my-program my-onnx/model.onnx

    With --exit-threshold, programs and files read the text token by token, as in generation, and stop loops early.

    With --tasks, models answer the questions of lm-eval's tasks instead.

    Example: loopq-compile eval my-program --tasks hellaswag,winogrande --limit 200

    With --save, figures of programs go into their folders and model cards, and into those of later exports.

    Example: loopq-compile eval bundled my-program --save
    """
    programs = [name for name in models if _is_program(name)] if save else []
    if save and not programs:
        raise LoopQError("--save keeps figures in folders of programs, and none of these is one.")
    if save and exit_threshold is not None:
        raise LoopQError("--save keeps figures of whole programs; leave --exit-threshold out.")

    def loaded_model(name: str) -> Loaded:
        return load(name, tokenizer, trust_remote_code, _repeat_for(name, repeat), allow_pickle, dtype, device)

    if tasks is not None:
        chosen = {"tasks": names(tasks), "folder": task_folder, "fewshot": fewshot, "limit": limit}
        answers = _run_tasks(models, loaded_model, json, **chosen)
        for name in programs:
            _save(name, _task_figures(answers[name], fewshot, limit))
        return
    options: dict[str, Any] = {"length": length, "stride": stride, "max_tokens": max_tokens}
    rows = _score_text(models, loaded_model, json, file=text, exit_threshold=exit_threshold, **options)
    for row in rows:
        if row["model"] in programs:
            _save(row["model"], _text_figures(row, rows[0], text, f"windows of {length} tokens, stride {stride}"))


def _score_text(
    models: list[str],
    load: Callable[[str], Loaded],
    json: bool,
    *,
    file: str | None,
    length: int,
    stride: int,
    max_tokens: int,
    exit_threshold: float | None,
) -> list[dict[str, Any]]:
    """Measures and shows; returns a row for every model."""
    from loopq_compile.evaluation.perplexity import Remembered, evaluate
    from loopq_compile.generation.decoders import TokenByToken
    from loopq_compile.generation.tokenizer import tokenize

    content, source = text_source(file, max_tokens) if file else (None, "")
    rows: list[dict[str, Any]] = []
    teacher: Any = None
    teacher_tokens: Any = None
    for name in models:
        loaded = load(name)
        if content is None:  # takes seconds, so it is done after the model is loaded
            content, source = text_source(file)
        tokens = tokenize(loaded.tokenizer, content, max_tokens)
        compare = teacher if teacher_tokens is not None and tokens.equal(teacher_tokens) else None
        early = exit_threshold is not None and hasattr(loaded.model, "decoder")
        run: Any = TokenByToken(loaded.model, exit_threshold=exit_threshold) if early else loaded.model
        model = Remembered(run) if teacher_tokens is None and len(models) > 1 else run
        options: dict[str, Any] = {"batch": 1} if early else {}
        score = evaluate(model, tokens, teacher=compare, length=length, stride=stride, title=name, **options)
        rows.append({"model": name, "kind": loaded.kind, **score.to_dict()})
        if early:
            rows[-1]["loops"] = sum(run.loops_spent) / len(run.loops_spent)
        if teacher_tokens is None:
            teacher, teacher_tokens = model, tokens
    if json:
        print_json({"text": source, "length": length, "stride": stride, "results": rows})
        return rows
    out = console()
    columns = (*COLUMNS, "loops") if exit_threshold is not None else COLUMNS
    out.print(table(columns, [_cells(row)[: len(columns)] for row in rows], text_columns=2))
    out.print(f"\ntext: {source}; windows of {length} tokens, stride {stride}", markup=False)
    return rows


def _is_program(name: str) -> bool:
    from loopq_compile.sources.loading import PROGRAM_FILE

    return (Path(name) / PROGRAM_FILE).is_file()


def _text_figures(row: dict[str, Any], first: dict[str, Any], file: str | None, how: str) -> list[Figure]:
    """Figures of a row; names of files, never their folders, since a card may be published."""
    from loopq_compile.graph.state import Figure

    data, how = Path(file).name if file else "held-out text of the bundled model", f"{row['tokens']:,} tokens, {how}"
    metrics = {"perplexity": row["perplexity"]}
    if row is not first and row["kl"] is not None:
        teacher = Path(first["model"]).name if Path(first["model"]).exists() else first["model"]
        metrics |= {f"KL divergence from {teacher}": row["kl"], f"agreement with {teacher}": row["agreement"]}
    return [Figure(data, metric, how, value) for metric, value in metrics.items() if value is not None]


def _task_figures(found: dict[str, Any], fewshot: int | None, limit: int | None) -> list[Figure]:
    from loopq_compile.graph.state import Figure

    how = ", ".join([f"{fewshot or 0}-shot", *([f"{limit} questions"] if limit else [])])
    return [
        Figure(Path(task).name, metric.removesuffix(",none"), how, float(value))
        for task, metrics in found.items()
        for metric, value in metrics.items()
        if "_stderr" not in metric and isinstance(value, float) and math.isfinite(value)
    ]


def _save(folder: str, figures: list[Figure]) -> None:
    """Keeps figures beside a program, and writes its card anew."""
    from loopq_compile.graph.state import get_state
    from loopq_compile.storage import artifact
    from loopq_compile.storage.card import write_card
    from loopq_compile.storage.evaluation import add_figures

    add_figures(folder, figures)
    write_card(folder, get_state(artifact.read(folder)), "program")


def _repeat_for(name: str, repeat: str | None) -> str | None:
    """Layers are repeated only in Hugging Face models; programs and ONNX files stay unchanged."""
    from loopq_compile.sources.loading import PROGRAM_FILE

    compiled = name.endswith((".onnx", PROGRAM_FILE)) or (
        Path(name).is_dir() and not (Path(name) / "config.json").exists()
    )
    return None if compiled else repeat


def _run_tasks(
    models: list[str], load: Callable[[str], Loaded], json: bool, **options: Any
) -> dict[str, dict[str, Any]]:
    """Asks and shows; returns metrics by model and task."""
    from loopq_compile.evaluation.lm_eval import LanguageModel, run_tasks

    results = {}
    for name in models:
        loaded = load(name)
        results[name] = run_tasks(LanguageModel(loaded.model, loaded.tokenizer, settings=loaded.settings), **options)
    if json:
        print_json({"tasks": options["tasks"], "results": results})
        return results
    rows = []
    for task, metrics in results[models[0]].items():
        for metric in metrics:
            if "_stderr" not in metric and isinstance(metrics[metric], float):
                found = [_with_error(results[name].get(task, {}), metric) for name in models]
                rows.append((task, metric.removesuffix(",none"), *found))
    console().print(table(("task", "metric", *models), rows, text_columns=2))
    return results


def _with_error(metrics: dict[str, Any], metric: str) -> str:
    name, _, filtered = metric.partition(",")
    error = metrics.get(f"{name}_stderr,{filtered}")
    value = f"{metrics[metric]:.4f}" if metric in metrics else ""
    return f"{value} ± {error:.4f}" if isinstance(error, float) else value


def _cells(row: dict[str, Any]) -> list[str]:
    def number(name: str, form: str) -> str:
        return "" if row[name] is None else format(row[name], form)

    return [
        row["model"],
        row["kind"],
        number("perplexity", ".3f") or "inf",
        number("nll", ".4f"),
        number("kl", ".4f"),
        number("agreement", ".1%"),
        number("tokens", ","),
        number("seconds", ".1f"),
        f"{row['loops']:.2f}" if "loops" in row else "",
    ]
