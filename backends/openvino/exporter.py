"""From a program to a folder for OpenVINO."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import fx

from loopq_compile.backends.onnx.contrib import rounded_linears
from loopq_compile.backends.onnx.exporter import open_form
from loopq_compile.backends.onnx.lowering import carrying
from loopq_compile.backends.onnx.naming import IR_VERSION
from loopq_compile.backends.openvino.conversions import extensions, store_half
from loopq_compile.backends.openvino.folder import DATA_FILE, KIND, MODEL_FILE, versions
from loopq_compile.backends.openvino.state import keep_state
from loopq_compile.errors import LoopQError, first_line
from loopq_compile.graph.caches import has_cache
from loopq_compile.graph.rolled import rolled_loops
from loopq_compile.graph.state import CompilerState, get_state
from loopq_compile.storage.atomic import check_folder, writing_folder
from loopq_compile.storage.card import write_card

_HEAD_BITS = (4, 8)
_CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class OpenVinoExport:
    """What was written.

    Args:
        path, bytes: the model, and the size of the folder's two files of it.
        nodes: its operations, without constants.
        weights: how many constants have which type.
        rounded_by_engine: how many linears get activations that OpenVINO rounds to 8 bits itself.
    """

    path: Path
    bytes: int
    nodes: int
    weights: Mapping[str, int]
    rounded_by_engine: int

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} constants in {kind}" for kind, count in sorted(self.weights.items()))
        line = f"{self.path}: {self.bytes:,} bytes, {self.nodes:,} operations, {kinds}"
        if self.rounded_by_engine:
            line += f"\nOpenVINO rounds the inputs of {self.rounded_by_engine} linears to 8 bits itself"
        return line


def export(
    graph_module: fx.GraphModule,
    directory: str | os.PathLike[str],
    *,
    last_token: bool = False,
    head_bits: int | None = None,
    float_bits: int = 32,
) -> OpenVinoExport:
    """Writes a program as a folder for OpenVINO; see `Program.export_openvino`."""
    if head_bits is not None and head_bits not in _HEAD_BITS:
        raise LoopQError(f"head_bits must be 4 or 8; got {head_bits!r}.")
    if float_bits not in (16, 32):
        raise LoopQError(f"float_bits must be 16 or 32; got {float_bits!r}.")
    openvino = _package()
    if has_cache(get_state(graph_module).signature) or rolled_loops(graph_module):
        raise LoopQError("This program has a cache, or is rolled. Export the plain one: OpenVINO keeps its own cache.")
    check_folder(directory, KIND, [MODEL_FILE, DATA_FILE, _CONFIG_FILE])
    source = open_form(graph_module, cache=True, last_token=last_token)
    rounded = len(rounded_linears(source.model.graph))
    model = _read(openvino, carrying(head_bits).run(source.model))
    keep_state(model)
    _describe(model, source.state, rounded)
    if float_bits == 16:
        store_half(model)
    with writing_folder(directory, KIND, more=versions()) as made:
        openvino.save_model(model, str(made / MODEL_FILE), compress_to_fp16=False)
        config = source.state.origin.to_dict()["config"]
        if config:  # other tools look up how the model generates
            (made / _CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        size = sum((made / name).stat().st_size for name in (MODEL_FILE, DATA_FILE))
    write_card(directory, get_state(graph_module), "openvino")
    nodes = model.get_ops()
    constants = [node.get_element_type().to_string() for node in nodes if node.get_type_name() == "Constant"]
    weights = Counter(kind for kind in constants if kind in ("i4", "i8"))
    path = Path(directory) / MODEL_FILE
    return OpenVinoExport(path, size, len(nodes) - len(constants), dict(weights), rounded)


def _read(openvino: Any, model: ir.Model) -> Any:
    """The translated model as an `openvino.Model`."""
    core = openvino.Core()
    for extension in extensions():
        core.add_extension(extension)
    model.ir_version = IR_VERSION
    with tempfile.TemporaryDirectory(prefix="loopq-openvino-") as folder:
        file = Path(folder) / "model.onnx"
        ir.save(model, file, external_data="model.onnx.data")
        try:
            return core.read_model(str(file))
        except RuntimeError as error:
            raise LoopQError(f"OpenVINO {openvino.__version__} cannot read this model: {first_line(error)}") from error


def _describe(model: Any, state: CompilerState, rounded: int) -> None:
    """Writes into the model how OpenVINO should round activations: by default it does so in groups of 32 before each
    product with integers."""
    if state.scheme is not None and (not rounded or state.scheme.group_size > 0):
        group = state.scheme.group_size if rounded else 0
        model.set_rt_info(str(group), ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])


def _package() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise LoopQError("This needs the package openvino: pip install 'loopq-compile[openvino]'.") from error
    return openvino
