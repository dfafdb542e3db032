"""`loopq-compile verify`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from loopq_compile.cli.common import Json, console, print_json, table


def verify_command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder written by `loopq-compile compile`.")],
    json: Json = False,
) -> None:
    """Check that a saved program is whole: hashes, format version, shapes, finite tables, a valid graph, loop tags.

    Ends with status 0 if nothing is wrong, else with one line that says what is, and status 1. Nothing in the folder
    is executed or unpickled.
    """
    from loopq_compile.artifact import verify

    found = verify(directory)
    if json:
        print_json(asdict(found))
        return
    out = console()
    out.print(table(("file", "bytes", "sha256"), [(f.name, f"{f.bytes:,}", f.sha256) for f in found.files]))
    out.print(f"\n{found.description}", markup=False, soft_wrap=True)
    out.print(f"{found.nodes:,} nodes, {found.tensors} tensors, format version {found.version}: nothing is wrong")
    if found.unlisted:
        out.print(f"not part of the program: {', '.join(found.unlisted)}", markup=False, soft_wrap=True)
