"""`loopq-compile report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loopq_compile.cli.common import (
    AllowPickle,
    Device,
    Dtype,
    Json,
    RepeatLayers,
    TextFile,
    TrustRemoteCode,
    check_text,
    load,
    note,
    print_json,
    text_source,
)
from loopq_compile.errors import LoopQError


def report_command(
    programs: Annotated[
        list[str], typer.Argument(metavar="DIR...", help="Folders written by `loopq-compile compile`; several compare.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The HTML file.")] = Path("report.html"),
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="What they were compiled from, such as bundled; for errors and samples."),
    ] = None,
    svg: Annotated[
        Path | None, typer.Option("--svg", metavar="FILE", help="Also write the error along the loops as a picture.")
    ] = None,
    text: TextFile = None,
    max_tokens: Annotated[int, typer.Option(min=16, help="Held-out tokens to compare on, in rows of 64.")] = 256,
    samples: Annotated[int, typer.Option(min=0, help="Continuations to show.")] = 2,
    repeat: RepeatLayers = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    dtype: Dtype = "float32",
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Write the effect of quantization on every loop as one HTML file that needs no network.

    Example: loopq-compile report my-program other-program --model bundled --out report.html
    """
    from loopq_compile.analysis.report import measure, trajectory, write, write_page
    from loopq_compile.analysis.report.measure import check_names
    from loopq_compile.generation.tokenizer import tokenize
    from loopq_compile.storage.atomic import check_file

    check_names(programs)
    check_text(text)
    for file in (out, svg):
        if file:
            check_file(file)
    if svg and model is None:
        raise LoopQError("--svg draws errors, which need the model: give --model.")
    last = [Path(program).name for program in programs]
    names = last if len(set(last)) == len(last) else programs
    loaded = {name: load(program, device=device) for name, program in zip(names, programs, strict=True)}
    for name, one in loaded.items():
        if one.kind not in ("model", "program"):
            raise LoopQError(f"{name} is an export; report takes the program that it was made from.")
        if one.kind != "program":
            raise LoopQError(f"{name} is not a compiled program; run `loopq-compile compile {name} --out DIR` first.")
    batches, base, tokenizer = [], None, None
    if model is not None:
        source = load(model, None, trust_remote_code, repeat, allow_pickle, dtype, device)
        if source.kind != "model":
            raise LoopQError(f"{model} is quantized already; --model takes the model in floating point.")
        base, tokenizer = source.model, source.tokenizer
        ids = tokenize(tokenizer, text_source(text, max_tokens)[0], max_tokens)
        batches = [row.view(1, -1) for row in ids.split(min(64, len(ids))) if len(row) == min(64, len(ids))]
    found = {
        name: measure(one.model, base, batches, tokenizer=tokenizer, samples=samples) for name, one in loaded.items()
    }
    path = write(out, found)
    if svg:
        write_page(svg, trajectory(found))
    if json:
        print_json({"out": str(path), "programs": found})
    else:
        note(json)(f"wrote {path}{f' and {svg}' if svg else ''}")
