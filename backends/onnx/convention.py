"""The calling convention in an ONNX file: argument names, input types and the structure of the result, as JSON in the
file's metadata under `loopq.signature`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils import _pytree as pytree

from loopq_compile.errors import LoopQError
from loopq_compile.graph.signature import Signature, result_names, signature_from_dict, signature_to_dict

METADATA_KEY = "loopq.signature"

_FORMAT = 1


@dataclass
class Convention:
    """What `OnnxExecutable` needs so that it is called like the model.

    Args:
        signature: argument names and types. Its `outputs` is a plain tuple if the model's own structure cannot be
            rebuilt here (a class that is not importable).
        outputs: for every flat result, the number of the ONNX output that holds it, or `{"constant": value}`.
    """

    signature: Signature
    outputs: list[Any]

    def restore(self, tensors: Sequence[Any]) -> Any:
        """The model's result from the file's outputs."""
        flat = [slot["constant"] if isinstance(slot, dict) else tensors[slot] for slot in self.outputs]
        return self.signature.restore(flat)


def output_names(signature: Signature, outputs: Sequence[Any]) -> list[str]:
    """Names of the ONNX outputs: the result's own (`logits`, `past_key_values.0`) where it has any, else `output_0`."""
    own = result_names(signature.outputs)
    taken = {spec.name for spec in signature.inputs}
    names: dict[int, str] = {}
    for position, slot in enumerate(outputs):
        if isinstance(slot, dict) or slot in names:
            continue
        name = own[position] or f"output_{slot}"
        while name in taken:
            name += "_out"
        taken.add(name)
        names[slot] = name
    return [names[slot] for slot in sorted(names)]


def to_json(signature: Signature, outputs: Sequence[Any]) -> str:
    """`signature` and the places of its results as text."""
    return json.dumps({"format": _FORMAT, "signature": signature_to_dict(signature), "results": list(outputs)})


def from_json(text: str) -> Convention:
    """Inverse of `to_json`; a result of a type that cannot be imported here becomes a tuple.

    Raises:
        LoopQError: the text was not written by this version's `to_json`.
    """
    try:
        data = json.loads(text)
        if data["format"] != _FORMAT:
            raise LoopQError(
                f"The file's signature has format {data['format']}, this version of loopq_compile reads {_FORMAT}."
            )
        results = data["results"]
        try:
            return Convention(signature_from_dict(data["signature"]), results)
        except LoopQError:
            plain: Any = tuple(range(len(results))) if len(results) > 1 else 0
            outputs = json.loads(pytree.treespec_dumps(pytree.tree_structure(plain)))
            return Convention(signature_from_dict({**data["signature"], "outputs": outputs}), results)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LoopQError(
            f"The signature in the file cannot be read ({type(error).__name__}: {error}); export it again."
        ) from error
