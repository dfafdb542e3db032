"""Tensors that wait on disk until they are needed, such as those of the best state so far."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from loopq_compile.calibration.sharding import is_divided

MEMORY_BYTES = 32 << 20
"""Tensors stay in memory up to this total size."""


def on_disk(tensors: Mapping[str, Tensor], folder: Path | None) -> dict[str, Tensor]:
    """`tensors`, read from a mapped file when they are needed: no memory until then.

    The file has no name any more, so the system frees its space with the last of the tensors. What is small, on a GPU
    or divided among processes stays as it is, and so does everything if the disk is full.

    Args:
        tensors: values that nothing changes later.
        folder: where the file goes; None for the system's temporary files.
    """
    found = dict(tensors)
    large = {name: x for name, x in found.items() if not is_divided(x) and x.device.type == "cpu"}
    if sum(x.nbytes for x in large.values()) <= MEMORY_BYTES:
        return found
    try:
        with tempfile.TemporaryDirectory(prefix="loopq-best-", dir=folder) as place:
            path = Path(place) / "best.safetensors"
            save_file({name: x.contiguous() for name, x in large.items()}, path)
            with safe_open(path, "pt") as file:
                return found | {name: file.get_tensor(name) for name in large}
    except (OSError, SafetensorError) as error:
        logging.getLogger(__name__).debug("the best state stays in memory: %s", error)
        return found
