"""Files of an export for OpenVINO, with the names that optimum-intel and openvino-genai look for."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

from loopq_compile.errors import LoopQError
from loopq_compile.storage.artifact import Verified
from loopq_compile.storage.atomic import settle
from loopq_compile.storage.card import CARD_FILE
from loopq_compile.storage.manifest import ManifestKind, check_files, read_json

MODEL_FILE, DATA_FILE = "openvino_model.xml", "openvino_model.bin"
KIND = ManifestKind("openvino_manifest.json", "loopq_compile.openvino", 1, "export")


def versions() -> dict[str, Any]:
    """What a manifest says about the package that wrote a model."""
    return {"versions": {"openvino": importlib.metadata.version("openvino")}}


def verify(directory: Path) -> Verified:
    """Compares files with the manifest.

    Raises:
        LoopQError: one line that says what is wrong.
    """
    settle(directory)
    records = check_files(directory, (MODEL_FILE, DATA_FILE), KIND)
    if records is None:
        raise LoopQError(f"{directory} has no {KIND.file}; export the program again.")
    here = {path.name for path in directory.iterdir()} - set(records) - {KIND.file, CARD_FILE}
    return Verified(
        directory=str(directory),
        version=read_json(directory / KIND.file)["version"],
        files=tuple(records.values()),
        unlisted=tuple(sorted(here)),
        description="a model for OpenVINO",
        nodes=0,
        tensors=0,
    )
