"""Keeps the teacher's answers: the first in memory, the rest in mapped files, so that it is asked once for a batch."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from loopq_compile.calibration.objective import Targets
from loopq_compile.errors import LoopQError
from loopq_compile.processes import world

MEMORY_BYTES = 256 << 20
"""Targets are kept in memory up to this total size; beyond it they go to files."""


class TargetStore:
    """The targets of batches by number, without any loss of precision.

    Args:
        checkpoint: folder of the calibration's checkpoints, where files go; None for the system's temporary files.
        watched: names of the nodes whose states the targets hold; they name the files in a checkpoint folder.
    """

    def __init__(self, checkpoint: str | None = None, watched: Sequence[str] = ()) -> None:
        self._checkpoint, self._watched = checkpoint, tuple(watched)
        self._memory: dict[int, Targets] = {}
        self._files: dict[int, tuple[Path, torch.device]] = {}
        self._bytes, self._full = 0, False
        self._folder: Path | None = None
        self._delete: weakref.finalize | None = None

    def get(self, number: int) -> Targets | None:
        """The targets of batch `number`; None if they are not kept.

        Raises:
            LoopQError: somebody deleted the files.
        """
        if number in self._memory or number not in self._files:
            return self._memory.get(number)
        path, device = self._files[number]
        try:
            with safe_open(path, "pt") as file:
                found = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise LoopQError(
                f"The teacher's answers in {path} cannot be read ({error}). Leave that folder alone while calibration "
                "runs; start it again."
            ) from error
        outputs, states = (
            [found[f"{kind}.{i}"] for i in range(sum(name.startswith(f"{kind}.") for name in found))]
            for kind in ("output", "state")
        )
        logits, indices, total = (found.get(name) for name in ("logits", "indices", "total"))
        return Targets(logits, indices, total, outputs, states, found.get("mask"))

    def put(self, number: int, targets: Targets) -> None:
        """Keeps the targets of batch `number`; does nothing from the moment that the disk is full."""
        tensors = _tensors(targets)
        size = target_bytes(targets)
        if self._bytes + size <= MEMORY_BYTES:
            self._memory[number], self._bytes = targets, self._bytes + size
        elif not self._full:
            self._write(number, tensors)

    def close(self) -> None:
        """Deletes the files, and forgets everything."""
        self._memory.clear()
        self._files.clear()
        self._bytes = 0
        if self._delete is not None:
            self._delete()
            self._folder = self._delete = None

    def _write(self, number: int, tensors: dict[str, Tensor]) -> None:
        path = None
        try:
            path = self._place() / f"{number}.safetensors"
            save_file({name: tensor.cpu().clone().contiguous() for name, tensor in tensors.items()}, path)
        except (OSError, SafetensorError) as error:
            self._full = True
            if path is not None:
                path.unlink(missing_ok=True)
            where = self._folder or self._checkpoint or tempfile.gettempdir()
            warnings.warn(
                f"The teacher's answers cannot be written to {where} ({error}). Calibration goes on and asks the "
                "teacher again, which takes longer. Free space there, or choose another checkpoint folder or TMPDIR.",
                stacklevel=2,
            )
            return
        self._files[number] = path, next(iter(tensors.values())).device

    def _place(self) -> Path:
        if self._folder is None:
            if self._checkpoint is None:
                self._folder = Path(tempfile.mkdtemp(prefix="loopq-targets-"))
            else:
                mark = hashlib.sha256(repr(self._watched).encode()).hexdigest()[:8]
                self._folder = Path(self._checkpoint) / f"targets-{world()[0]}-{mark}"
                shutil.rmtree(self._folder, ignore_errors=True)  # left by a killed process
                self._folder.mkdir(parents=True)
            self._delete = weakref.finalize(self, shutil.rmtree, self._folder, True)
        return self._folder


def target_bytes(targets: Targets) -> int:
    """The size of the teacher's answer on one batch."""
    return sum(tensor.nbytes for tensor in _tensors(targets).values())


def _tensors(targets: Targets) -> dict[str, Tensor]:
    named = {"logits": targets.logits, "indices": targets.indices, "total": targets.total, "mask": targets.mask}
    named |= {f"output.{i}": tensor for i, tensor in enumerate(targets.outputs)}
    named |= {f"state.{i}": tensor for i, tensor in enumerate(targets.states)}
    return {name: tensor for name, tensor in named.items() if tensor is not None}
