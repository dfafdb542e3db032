"""Writing the file: checked first, moved into position last, never half."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import onnx
import onnx_ir as ir

from loopq_compile.backends.onnx.folder import KIND, MODEL_FILE, record
from loopq_compile.errors import InternalError, LoopQError

DATA_FILE = "model.onnx.data"

EXTERNAL_DATA_THRESHOLD = 2**26
"""Bytes of weights above which they get a file of their own.

ONNX Runtime maps such a file: what its kernels pack anew is let go, and of embeddings only the pages that are looked up
take memory. Weights inside of the model are copied out of it, and the copies leave holes.
"""

_LARGEST_MODEL = 2**31 - 2**26
"""Bytes of weights that fit into one file, whatever is asked for: protobuf ends at 2 GiB, and the graph needs some."""


def check_destination(directory: Path, *, overwrite: bool) -> None:
    """Refuses early what `write_model` would refuse late.

    Raises:
        LoopQError: `directory` is a file or not writable, or holds a model that must not be overwritten.
    """
    try:
        there = (directory / MODEL_FILE).exists()
        existing = next(folder for folder in (directory, *directory.absolute().parents) if folder.exists())
    except OSError as error:  # a folder above that may not be entered
        raise LoopQError(f"Cannot write {directory / MODEL_FILE}: {error.strerror or error}.") from error
    if there and not overwrite:
        raise LoopQError(f"{directory / MODEL_FILE} exists; choose another directory or give overwrite=True.")
    if not existing.is_dir():
        raise LoopQError(f"Cannot write {directory / MODEL_FILE}: {existing} is a file.")
    if not os.access(existing, os.W_OK):
        raise LoopQError(f"Cannot write {directory / MODEL_FILE}: no permission to write in {existing}.")


def write_model(model: ir.Model, directory: Path, *, threshold: int) -> list[Path]:
    """Writes `model.onnx` (and `model.onnx.data` if the weights take more than `threshold` bytes) into `directory`, and
    a manifest with their sizes and hashes.

    The files are written to a temporary folder inside `directory`, pass `onnx.checker` with shape inference there, and
    are then moved into position; whatever goes wrong before leaves the directory as it was.

    Returns:
        The files, the model first.

    Raises:
        LoopQError: the directory cannot be written or the disk is full.
        InternalError: the checker refuses the model.
    """
    new_folders = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    temporary: Path | None = None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".loopq-", dir=directory))
        external = sum(
            value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value
        ) > min(threshold, _LARGEST_MODEL)
        ir.save(model, temporary / MODEL_FILE, external_data=DATA_FILE if external else None)
        _check(temporary / MODEL_FILE)
        written = [name for name in (DATA_FILE, MODEL_FILE) if (temporary / name).exists()]
        record(temporary, written)
        for name in (*written, KIND.file):  # the data first: a model never stands without its weights
            os.replace(temporary / name, directory / name)
        if not external:
            (directory / DATA_FILE).unlink(missing_ok=True)
        new_folders = []
        return [directory / name for name in reversed(written)]
    except OSError as error:
        raise LoopQError(f"Cannot write {directory / MODEL_FILE}: {error.strerror or error}.") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for folder in new_folders:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _check(path: Path) -> None:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise InternalError(f"onnx.checker refuses the exported model: {error}") from error
