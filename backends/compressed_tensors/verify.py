"""Checks that a folder is complete and unchanged."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from loopq_compile.errors import LoopQError, first_line
from loopq_compile.storage.artifact import Verified
from loopq_compile.storage.atomic import settle
from loopq_compile.storage.card import CARD_FILE
from loopq_compile.storage.manifest import ManifestKind, check_files, read_json

KIND = ManifestKind("hugging_face_manifest.json", "loopq_compile.hugging_face", 1, "export")
CONFIG_FILE = "config.json"


def verify(directory: Path) -> Verified:
    """Compares files with the manifest, and reads the configuration and the names of all tensors.

    Raises:
        LoopQError: one line that says what is wrong.
    """
    settle(directory)
    records = check_files(directory, (CONFIG_FILE,), KIND)
    if records is None:
        raise LoopQError(f"{directory} has no {KIND.file}; export the program again.")
    config = read_json(directory / CONFIG_FILE)
    names: list[str] = []
    for file in (name for name in records if name.endswith(".safetensors")):
        try:
            with safe_open(directory / file, "pt") as stored:
                names += stored.keys()
        except (SafetensorError, OSError) as error:
            raise LoopQError(f"{directory / file} is damaged: {first_line(error)}.") from error
    here = {path.name for path in directory.iterdir()} - set(records) - {KIND.file, CARD_FILE}
    settings = config.get("quantization_config") or {}
    return Verified(
        directory=str(directory),
        version=read_json(directory / KIND.file)["version"],
        files=tuple(records.values()),
        unlisted=tuple(sorted(here)),
        description=f"{', '.join(config.get('architectures') or ())}: {settings.get('quant_method')}, "
        f"{settings.get('format')}",
        nodes=0,
        tensors=len(names),
    )
