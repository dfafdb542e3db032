"""Checkpoints of a calibration: one safetensors file per phase, written to a temporary file and moved into place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from loopq_compile.errors import LoopQError
from loopq_compile.processes import first_only
from loopq_compile.storage.atomic import writing_file


@first_only
def write(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Replaces `path` by `tensors` and `facts` atomically: a kill leaves either the old file or the new one.

    Raises:
        LoopQError: the file cannot be written; an older one is still there.
    """
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with writing_file(path) as made:
            save_file(whole, made, {"facts": json.dumps({**facts, "digest": _digest(whole)})})
    except (LoopQError, SafetensorError) as error:
        raise LoopQError(f"Cannot write the checkpoint {path}: {error}") from error


def read(path: Path, fingerprint: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """`(tensors, facts)` of a checkpoint, None if there is none.

    Raises:
        LoopQError: it is damaged, or belongs to another calibration.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})["facts"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if facts.pop("digest") != _digest(tensors):
            raise ValueError("its checksum is wrong")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise LoopQError(f"The checkpoint {path} is damaged ({error}); delete it to start again.") from error
    if facts.get("fingerprint") != fingerprint:
        raise LoopQError(
            f"The checkpoint {path} belongs to another calibration: model, data, scheme, method or options differ. "
            "Choose another checkpoint folder, or delete it to start again."
        )
    return tensors, facts


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Checksum of everything stored, since a damaged file may still be readable."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
