"""How a call travels in an ONNX file: argument names, input types and the structure of the result, as JSON in the
file's metadata under `loopq.signature`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from loopq_compile.errors import LoopQError
from loopq_compile.signature import InputSpec, Signature

METADATA_KEY = "loopq.signature"

_FORMAT = 1


@dataclass
class Convention:
    """What `OnnxExecutable` needs to be called like the model.

    Args:
        signature: argument names and types. Its `outputs` is a plain tuple if the model's own structure cannot be
            rebuilt here (a class that is not importable).
        outputs: for every flat result the number of the ONNX output that holds it, or `{"constant": value}`.
        exact: False if the result comes as a tuple instead of the model's own structure.
    """

    signature: Signature
    outputs: list[Any]
    exact: bool = True

    def restore(self, tensors: Sequence[Any]) -> Any:
        """The model's result from the file's outputs."""
        flat = [slot["constant"] if isinstance(slot, dict) else tensors[slot] for slot in self.outputs]
        return self.signature.restore(flat)


def output_names(signature: Signature, outputs: Sequence[Any]) -> list[str]:
    """Names of the ONNX outputs: the result's own (`logits`, `past_key_values.0`) where it has any, else `output_0`."""
    try:
        numbered = signature.restore(range(len(outputs)))
        paths = {leaf: path for path, leaf in pytree.tree_flatten_with_path(numbered)[0]}
    except Exception:  # a user's own container may refuse numbers in place of tensors
        paths = {}
    taken = {spec.name for spec in signature.inputs}
    names: dict[int, str] = {}
    for position, slot in enumerate(outputs):
        if isinstance(slot, dict) or slot in names:
            continue
        parts = [
            str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in paths.get(position, ())
        ]
        name = ".".join(parts) if parts and not parts[0].isdigit() else f"output_{slot}"
        while name in taken:
            name += "_out"
        taken.add(name)
        names[slot] = name
    return [names[slot] for slot in sorted(names)]


def to_json(signature: Signature, outputs: Sequence[Any]) -> str:
    """`signature` and the places of its results as text."""
    structure: str | None = None
    with contextlib.suppress(Exception):  # containers that are not registered by name; the reader gets a tuple
        structure = pytree.treespec_dumps(signature.outputs)
    return json.dumps(
        {
            "format": _FORMAT,
            "parameters": signature.parameters,
            "inputs": [
                {"name": spec.name, "dtype": str(spec.dtype).removeprefix("torch."), "shape": spec.shape}
                for spec in signature.inputs
            ],
            "constants": signature.constants,
            "outputs": outputs,
            "structure": structure,
        }
    )


def from_json(text: str) -> Convention:
    """Inverse of `to_json`.

    Raises:
        LoopQError: the text was not written by this version's `to_json`.
    """
    try:
        data = json.loads(text)
        if data["format"] != _FORMAT:
            raise LoopQError(
                f"The file's signature has format {data['format']}, this version of loopq_compile reads {_FORMAT}."
            )
        structure, exact = _structure(data["structure"], len(data["outputs"]))
        inputs = tuple(
            InputSpec(item["name"], getattr(torch, item["dtype"]), tuple(item["shape"])) for item in data["inputs"]
        )
        signature = Signature(tuple(data["parameters"]), inputs, dict(data["constants"]), structure)
        return Convention(signature, data["outputs"], exact)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LoopQError(
            f"The signature in the file cannot be read ({type(error).__name__}: {error}); export it again."
        ) from error


def _structure(text: str | None, leaves: int) -> tuple[pytree.TreeSpec, bool]:
    if text is not None:
        if '"transformers.' in text:
            with contextlib.suppress(ImportError):  # importing it registers its output classes
                importlib.import_module("transformers.modeling_outputs")
        with contextlib.suppress(Exception):
            return pytree.treespec_loads(text), True
    plain: Any = tuple(range(leaves)) if leaves > 1 else 0
    return pytree.tree_structure(plain), False
