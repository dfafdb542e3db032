"""`loopq-compile eval`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from loopq_compile.cli.common import (
    Json,
    Length,
    MaxTokens,
    Stride,
    TextFile,
    TokenizerFile,
    TrustRemoteCode,
    console,
    load,
    print_json,
    table,
    text_source,
)

COLUMNS = ("model", "kind", "perplexity", "nll", "KL to first", "top-1 agreement", "tokens", "seconds")


def eval_command(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help='One or more: "bundled", Hugging Face folders or ids, program folders, .onnx files.',
        ),
    ],
    text: TextFile = None,
    length: Length = 256,
    stride: Stride = 128,
    max_tokens: MaxTokens = 16384,
    tokenizer: TokenizerFile = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Measure perplexity (lower is better): how well models predict a text.

    Windows of LENGTH tokens slide over the text by STRIDE; of each, only the new tokens are scored, so that every
    token has context and counts once. With several models, the others are also compared with the first one: KL
    divergence of their predictions per token, and how often they rank the same token first.

    Example: loopq-compile eval bundled my-program my-onnx/model.onnx
    """
    from loopq_compile.evaluate import Remembered, evaluate, tokenize

    content, source = text_source(text) if text else (None, "")
    rows: list[dict[str, Any]] = []
    teacher: Any = None
    teacher_tokens: Any = None
    for name in models:
        loaded = load(name, tokenizer, trust_remote_code)
        if content is None:  # takes seconds; not before the model is there
            content, source = text_source(text)
        tokens = tokenize(loaded.tokenizer, content, max_tokens)
        compare = teacher if teacher_tokens is not None and tokens.equal(teacher_tokens) else None
        model = Remembered(loaded.model) if teacher_tokens is None and len(models) > 1 else loaded.model
        score = evaluate(model, tokens, teacher=compare, length=length, stride=stride, title=name)
        rows.append({"model": name, "kind": loaded.kind, **score.to_dict()})
        if teacher_tokens is None:
            teacher, teacher_tokens = model, tokens
    if json:
        print_json({"text": source, "length": length, "stride": stride, "results": rows})
        return
    out = console()
    out.print(table(COLUMNS, [_cells(row) for row in rows], text_columns=2))
    out.print(f"\ntext: {source}; windows of {length} tokens, stride {stride}", markup=False)


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
    ]
