"""Runs an exported folder in OpenVINO."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loopq_compile.backends.openvino.folder import MODEL_FILE
from loopq_compile.backends.openvino.state import BEAMS
from loopq_compile.errors import LoopQError, first_line
from loopq_compile.storage.atomic import settle

_MASK = "attention_mask"


class OpenVinoExecutable:
    """An exported program in OpenVINO. Call it with token ids `[batch, sequence]` for logits.

    Args:
        path: `openvino_model.xml`, or its folder.
        threads: None leaves the choice to OpenVINO.
        exact: compute in float32, with keys and values in float32, and round no activations. By default OpenVINO does
            what is fastest on the processor.
        properties: further properties of OpenVINO by name.

    Raises:
        LoopQError: openvino is not installed, or the model is missing, damaged, or takes more than token ids.
    """

    kind = "openvino"

    def __init__(
        self, path: str | os.PathLike[str], *, threads: int | None = None, exact: bool = False, **properties: Any
    ) -> None:
        self.path = Path(path).expanduser()
        if self.path.is_dir():
            settle(self.path)
            self.path = self.path / MODEL_FILE
        if not self.path.is_file():
            raise LoopQError(f"There is no {self.path}; write it with `loopq-compile export --target openvino`.")
        settings = {"PERFORMANCE_HINT": "LATENCY", **({"INFERENCE_NUM_THREADS": threads} if threads else {})}
        settings |= EXACT if exact else {}
        self.compiled = _compile(self.path, settings | properties)
        others = {name for name in map(_name, self.compiled.inputs) if name not in (_MASK, BEAMS)}
        if len(others) != 1:
            raise LoopQError(f"{self.path} takes {', '.join(sorted(others))}; expected token ids only.")
        (self.ids_name,) = others
        self.input_names = {_name(value) for value in self.compiled.inputs}

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits `[batch, sequence, vocabulary]`, of the last token only if the model was exported so.

        Args:
            input_ids: `[batch, sequence]`.
            attention_mask: `[batch, sequence]`, 0 on padding, which is on the left; None for no padding.
        """
        return OpenVinoDecoder(self).read(input_ids, attention_mask)

    def decoder(self) -> OpenVinoDecoder:
        """A decoder that keeps keys and values of what it has read."""
        return OpenVinoDecoder(self)

    def generate(self, input_ids: Tensor, max_new_tokens: int = 32, **options: Any) -> Tensor:
        """Continues token ids `[batch, sequence]`; see `loopq_compile.generation.sampling.generate`."""
        from loopq_compile.generation.sampling import generate

        return generate(self, input_ids, max_new_tokens, **options)


EXACT = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
}
"""Properties with which OpenVINO rounds nothing that the model does not round."""


class OpenVinoDecoder:
    """Reads only new tokens; OpenVINO keeps keys and values of the others.

    Args:
        executable: the model.
    """

    def __init__(self, executable: OpenVinoExecutable) -> None:
        self.executable, self._request = executable, executable.compiled.create_infer_request()

    def __call__(self, new_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits `[batch, vocabulary]` of the next token; see `loopq_compile.generation.decoders.Decoder`."""
        return self.read(new_ids, attention_mask)[:, -1]

    def read(self, new_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits of the new tokens `[batch, new]`; the mask `[batch, total]` covers those before them, too.

        Raises:
            LoopQError: OpenVINO fails, for instance on ids outside the vocabulary.
        """
        mask = torch.ones_like(new_ids) if attention_mask is None else attention_mask
        feed = {
            self.executable.ids_name: new_ids.contiguous().numpy(),
            _MASK: mask.contiguous().numpy(),
            BEAMS: np.arange(len(new_ids), dtype=np.int32),
        }
        try:
            self._request.infer({name: value for name, value in feed.items() if name in self.executable.input_names})
        except RuntimeError as error:
            raise LoopQError(f"OpenVINO failed on {list(new_ids.shape)} token ids: {first_line(error)}") from error
        return torch.from_numpy(self._request.get_tensor("logits").data.copy())


def _compile(path: Path, settings: dict[str, Any]) -> Any:
    try:
        import openvino
    except ImportError as error:
        raise LoopQError("This needs the package openvino: pip install 'loopq-compile[openvino]'.") from error
    try:
        return openvino.Core().compile_model(str(path), "CPU", settings)
    except RuntimeError as error:
        raise LoopQError(f"OpenVINO {openvino.__version__} cannot open {path}: {first_line(error)}") from error


def _name(value: Any) -> str:
    return value.get_any_name()
