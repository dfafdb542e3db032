"""`loopq-compile verify`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loopq_compile.cli.common import Json, console, print_json, table

if TYPE_CHECKING:
    from loopq_compile.storage.artifact import Verified


def verify_command(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder written by `loopq-compile compile` or `export`.")
    ],
    json: Json = False,
) -> None:
    """Check that a saved program or an export is intact.

    Compares sizes and hashes with the manifest. For a program, also checks format version, shapes, finite tables, the
    graph and loop tags; for an export, that its weights are in the folder, have their sizes and no NaN, and that the
    ONNX checker accepts the model.

    Ends with status 0 if nothing is wrong; otherwise with one line that says what is wrong, and status 1. Nothing in
    the folder is executed or unpickled.
    """
    found = _verify(directory)
    if json:
        print_json(asdict(found[0]) if len(found) == 1 else [asdict(one) for one in found])
        return
    out = console()
    for one in found:
        out.print(table(("file", "bytes", "sha256"), [(f.name, f"{f.bytes:,}", f.sha256) for f in one.files]))
        out.print(f"\n{one.description}", markup=False, soft_wrap=True)
        out.print(f"{one.nodes:,} nodes, {one.tensors} tensors, format version {one.version}: nothing is wrong")
    unlisted = set.intersection(*(set(one.unlisted) for one in found))
    if unlisted:
        out.print(f"not part of it: {', '.join(sorted(unlisted))}", markup=False, soft_wrap=True)


def _verify(directory: Path) -> list[Verified]:
    """Checks a folder with a program, an export, or both."""
    from loopq_compile.backends.compressed_tensors import verify as weights
    from loopq_compile.backends.onnx import folder
    from loopq_compile.backends.openvino import folder as openvino
    from loopq_compile.storage import artifact
    from loopq_compile.storage.atomic import settle

    if directory.suffix == ".onnx" and directory.is_file():
        directory = directory.parent
    settle(directory)
    exported = (directory / folder.MODEL_FILE).exists() or (directory / folder.KIND.file).exists()
    for_engines = (directory / weights.KIND.file).exists()
    for_openvino = (directory / openvino.KIND.file).exists()
    saved = (directory / artifact.GRAPH_FILE).exists() or not (exported or for_engines or for_openvino)
    checks = ([artifact.verify] if saved else []) + ([folder.verify] if exported else [])
    checks += ([weights.verify] if for_engines else []) + ([openvino.verify] if for_openvino else [])
    return [check(directory) for check in checks]
