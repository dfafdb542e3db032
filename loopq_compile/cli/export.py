"""`loopq-compile export`: ONNX files, and lowered programs with kernels for NVIDIA GPUs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from loopq_compile.cli.common import Json, load, note, print_json, whole_numbers
from loopq_compile.errors import LoopQError


def export_command(
    program: Annotated[str, typer.Argument(metavar="DIR", help="Folder written by `loopq-compile compile`.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for what is written, and the tokenizer.")
    ],
    target: Annotated[
        str,
        typer.Option(
            help="qdq: ONNX with standard operators, for any runtime; onnxruntime: ONNX with packed products; "
            "triton: fused kernels, compiled for NVIDIA GPUs."
        ),
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
    architectures: Annotated[
        str,
        typer.Option("--sm", metavar="LIST", help="With --target triton: compute capabilities such as 80,90; or all."),
    ] = "",
    json: Json = False,
) -> None:
    """Write a compiled program as an ONNX file, or lowered to kernels for NVIDIA GPUs.

    ONNX files pass the ONNX checker and run in ONNX Runtime: try `loopq-compile generate DIR` on one.
    """
    from loopq_compile.loading import save_beside

    loaded = load(program)
    if loaded.kind != "program":
        raise LoopQError(f"{program} is no compiled program; run `loopq-compile compile {program} --out DIR` first.")
    if target == "triton":
        if form != "unrolled" or cache or last_token or head_bits:
            raise LoopQError(
                "--form, --cache, --last-token and --head-bits are for ONNX files, not for --target triton."
            )
        _export_kernels(loaded, out, architectures, json)
        return
    if architectures:
        raise LoopQError("--sm goes with --target triton.")
    report = loaded.model.export_onnx(
        out, target=target, form=form, cache=cache, last_token=last_token, head_bits=head_bits
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


def _export_kernels(loaded: Any, out: Path, architectures: str, json: bool) -> None:
    from loopq_compile.backends.triton import save
    from loopq_compile.backends.triton.ahead import ARCHITECTURES

    chosen = whole_numbers("--sm", architectures) or ARCHITECTURES
    report = save(loaded.model, out, architectures=chosen, extra_files=loaded.files())
    if json:
        print_json(asdict(report))
    else:
        note(json)(str(report))
