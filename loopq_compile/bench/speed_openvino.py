"""OpenVINO as a contestant of `bench speed`: int4 weights as NNCF compresses them, keys and values as its own state.

`python -m loopq_compile.bench.speed_openvino SOURCE FILE GROUP_SIZE HEAD_BITS` makes its file from a float32 ONNX file
with a key-value cache.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loopq_compile.bench.processes import run_module
from loopq_compile.errors import first_line
from loopq_compile.generation.decoders import Decoder
from loopq_compile.graph.caches import present_name

WAYS: Mapping[str, Mapping[str, str]] = {
    "openvino": {},
    "openvino float32": {"INFERENCE_PRECISION_HINT": "f32"},
}
"""What OpenVINO is told by name of the way. By default it computes in bfloat16 where the processor has that."""
_MASK = "attention_mask"


class OpenVinoDecoder:
    """A compiled model that keeps keys and values itself.

    Args:
        request: a fresh `openvino.InferRequest`.
        ids: name of the input of token ids.
    """

    def __init__(self, request: Any, ids: str) -> None:
        self.request, self.ids = request, ids

    def __call__(self, new_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """See `loopq_compile.generation.decoders.Decoder`."""
        self.request.infer({self.ids: new_ids.numpy(), _MASK: attention_mask.contiguous().numpy()})
        return torch.from_numpy(self.request.get_tensor("logits").data[:, -1].copy())


def decoders(file: Path, way: str) -> Callable[[], Decoder]:
    """A function that makes fresh decoders of a file from `write`, on one thread."""
    import openvino

    settings = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY", **WAYS[way]}
    compiled = openvino.Core().compile_model(str(file), "CPU", settings)
    ids = next(name for name in map(_name, compiled.inputs) if name != _MASK)
    return lambda: OpenVinoDecoder(compiled.create_infer_request(), ids)


def write(source: Path, file: Path, group_size: int, head_bits: int) -> None:
    """Makes OpenVINO's file in a process of its own.

    Args:
        source: a float32 ONNX file with a cache.
        file: `.xml` to write, with a `.bin` beside it.
        group_size: neighbouring weights that share a scale.
        head_bits: 8 or 4, of embeddings and head.

    Raises:
        LoopQError: OpenVINO or NNCF fails.
    """
    arguments = [str(source), str(file), str(group_size), str(head_bits)]
    run_module("speed_openvino", *arguments, failed="OpenVINO could not compress the model")


def compress(source: Path, file: Path, group_size: int, head_bits: int) -> None:
    """What `write` does, in this process."""
    import nncf
    import openvino

    model = openvino.Core().read_model(str(source))
    keep_state(model)
    mode = nncf.CompressWeightsMode.INT4_SYM
    model = nncf.compress_weights(model, mode=mode, group_size=group_size, ratio=1.0, all_layers=head_bits == 4)
    openvino.save_model(model, str(file), compress_to_fp16=False)


def keep_state(model: Any) -> None:
    """Changes an `openvino.Model` whose caches are inputs and outputs, as our files have them: it keeps them itself.

    An empty cache is made at the first call, for as many rows as there are token ids.
    """
    from openvino import opset13
    from openvino.passes import MakeStateful, Manager

    names = [_name(value) for value in model.inputs]
    outputs = {_name(value) for value in model.outputs}
    manager = Manager()
    manager.register_pass(MakeStateful({name: present_name(name) for name in names if present_name(name) in outputs}))
    manager.run_passes(model)
    ids = next(value for value in model.inputs if _name(value) != _MASK)
    first, axis = np.array([0], np.int64), np.array(0, np.int64)
    batch = opset13.gather(opset13.shape_of(ids, output_type="i64"), first, axis)
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            sizes = [0 if size.is_dynamic else size.get_length() for size in node.get_output_partial_shape(0)]
            shape = [batch, *(opset13.constant(np.array([size], np.int64)) for size in sizes[1:])]
            zero = opset13.constant(np.zeros((), node.get_output_element_type(0).to_dtype()))
            node.set_arguments([opset13.broadcast(zero, opset13.concat(shape, axis=0))])
    model.validate_nodes_and_infer_types()


def _name(value: Any) -> str:
    return value.get_any_name()


if __name__ == "__main__":
    try:
        compress(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    except Exception as error:  # one line for the table
        sys.exit(f"{type(error).__name__}: {first_line(error)}")
