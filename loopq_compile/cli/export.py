"""`loopq-compile export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loopq_compile.cli.common import Json, load, note, print_json
from loopq_compile.errors import LoopQError


def export_command(
    program: Annotated[str, typer.Argument(metavar="DIR", help="Folder written by `loopq-compile compile`.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for model.onnx and the tokenizer.")],
    target: Annotated[
        str, typer.Option(help="qdq: standard operators, for any runtime; onnxruntime: packed products.")
    ] = "qdq",
    form: Annotated[
        str, typer.Option(help="unrolled: every loop has its nodes; rolled: one Loop, its count an input.")
    ] = "unrolled",
    cache: Annotated[
        bool, typer.Option("--cache", help="Key-value cache: the file reads a prompt once and then token by token.")
    ] = False,
    last_token: Annotated[
        bool, typer.Option("--last-token", help="With --cache: compute logits for the last token alone.")
    ] = False,
    head_bits: Annotated[
        int | None,
        typer.Option("--head-bits", help="With --target onnxruntime: 4 or 8 bits for the head."),
    ] = None,
    kv_bits: Annotated[
        int | None, typer.Option("--kv-bits", help="With --cache: keys and values in 8 or 4 bits.")
    ] = None,
    early_exit: Annotated[
        bool,
        typer.Option("--early-exit", help="With --form rolled: stop the loop by the model's exit gate."),
    ] = False,
    float_bits: Annotated[
        int, typer.Option("--float-bits", help="16 stores scales, embeddings and head in half the bytes.")
    ] = 32,
    json: Json = False,
) -> None:
    """Write a compiled program as an ONNX file.

    The file passes the ONNX checker and runs in ONNX Runtime: try `loopq-compile generate DIR` on it.
    """
    from loopq_compile.loading import save_beside

    loaded = load(program)
    if loaded.kind != "program":
        raise LoopQError(f"{program} is no compiled program; run `loopq-compile compile {program} --out DIR` first.")
    report = loaded.model.export_onnx(
        out,
        target=target,
        form=form,
        cache=cache,
        last_token=last_token,
        head_bits=head_bits,
        kv_bits=kv_bits,
        early_exit=early_exit,
        float_bits=float_bits,
    )
    save_beside(loaded, out)
    if json:
        print_json(
            {
                "path": str(report.path),
                "bytes": report.bytes,
                "target": report.target,
                "form": report.form,
                "opset": report.opset,
                "nodes": report.nodes,
                "integer_weights": report.integer_weights,
                "inputs": report.inputs,
                "outputs": report.outputs,
            }
        )
    else:
        note(json)(str(report))
