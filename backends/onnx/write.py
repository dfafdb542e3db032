"""Writes the file: it is checked first and moved into position last, so it is never incomplete."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir

from loopq_compile.backends.onnx.folder import DATA_FILE, KIND, MODEL_FILE, versions
from loopq_compile.errors import InternalError, LoopQError
from loopq_compile.processes import leads
from loopq_compile.storage.atomic import check_folder, writing_folder

EXTERNAL_DATA_THRESHOLD = 2**26
"""Weights of more bytes than this get a separate file.

ONNX Runtime maps such a file: weights that its kernels repack are released, and embeddings take memory only for the
pages that are looked up. Weights inside the model are copied out of it, and the copies leave holes in memory.
"""

_LARGEST_MODEL = 2**31 - 2**26
"""Most bytes of weights in one file, regardless of options: protobuf ends at 2 GiB, and the graph needs some of it."""


def check_destination(directory: Path, *, overwrite: bool) -> None:
    """Checks early what `write_model` would refuse late.

    Raises:
        LoopQError: `directory` is a file or not writable, or holds a model that must not be overwritten.
    """
    goal = check_folder(directory, KIND)
    if leads() and (goal / MODEL_FILE).exists() and not overwrite:
        raise LoopQError(f"{goal / MODEL_FILE} exists; choose another directory or give overwrite=True.")
    check_folder(directory, KIND, (MODEL_FILE, DATA_FILE))


def write_model(model: ir.Model, directory: Path, *, threshold: int) -> list[Path]:
    """Writes `model.onnx` (and `model.onnx.data` if the weights take more than `threshold` bytes) into `directory`, and
    a manifest with their sizes and hashes; see `loopq_compile.storage.atomic`.

    The files pass `onnx.checker` with shape inference before they are moved into position.

    Returns:
        The files, the model first.

    Raises:
        LoopQError: the directory cannot be written or the disk is full.
        InternalError: the checker refuses the model.
    """
    with writing_folder(directory, KIND, more=versions()) as made:
        external = sum(
            value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value
        ) > min(threshold, _LARGEST_MODEL)
        ir.save(model, made / MODEL_FILE, external_data=DATA_FILE if external else None)
        _check(made / MODEL_FILE)
    return [directory.expanduser() / name for name in (MODEL_FILE, *([DATA_FILE] if external else []))]


def _check(path: Path) -> None:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise InternalError(f"onnx.checker refuses the exported model: {error}") from error
