"""Keys and values as OpenVINO's state: a request keeps them between calls, and the model has no inputs for them."""

from __future__ import annotations

from typing import Any

import numpy as np

from loopq_compile.graph.caches import present_name

BEAMS = "beam_idx"
"""Input `[batch]` of int32 that says which row's keys and values each row continues; other tools have this name."""


def keep_state(model: Any, mask: str = "attention_mask") -> None:
    """Changes an `openvino.Model` whose caches are inputs and outputs: it keeps them itself.

    Adds the input `beam_idx`, by which the rows of a cache are chosen before new tokens join it; in this form OpenVINO
    joins and reads them in one step. An empty cache is made at the first call, for as many rows as there are token ids.

    Args:
        model: as the ONNX backend exports it with `cache=True`.
        mask: name of the input that covers past and new tokens.
    """
    from openvino import Type, opset13
    from openvino.passes import MakeStateful, Manager

    names = [_name(value) for value in model.inputs]
    outputs = {_name(value) for value in model.outputs}
    kept = {name: present_name(name) for name in names if present_name(name) in outputs}
    beams = opset13.parameter([-1], Type.i32, name=BEAMS)
    beams.output(0).get_tensor().set_names({BEAMS})
    model.add_parameters([beams])
    rows = opset13.constant(np.array(0, np.int64))
    for value in list(model.inputs):
        if _name(value) in kept:
            readers = value.get_target_inputs()
            chosen = opset13.gather(value, beams, rows)
            for reader in readers:
                reader.replace_source_output(chosen.output(0))
    manager = Manager()
    manager.register_pass(MakeStateful(kept))
    manager.run_passes(model)
    ids = next(value for value in model.inputs if _name(value) not in (mask, BEAMS))
    batch = opset13.gather(opset13.shape_of(ids, output_type="i64"), np.array([0]), np.array(0))
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            sizes = [0 if size.is_dynamic else size.get_length() for size in node.get_output_partial_shape(0)]
            shape = [batch, *(opset13.constant(np.array([size])) for size in sizes[1:])]
            zero = opset13.constant(np.zeros((), node.get_output_element_type(0).to_dtype()))
            node.set_arguments([opset13.broadcast(zero, opset13.concat(shape, axis=0))])
    model.validate_nodes_and_infer_types()


def _name(value: Any) -> str:
    return value.get_any_name()
