"""Saved programs: a folder with `program.json` (graph, loops, scheme, log) and `tensors.safetensors`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, fx

import loopq_compile
from loopq_compile.errors import LoopQError
from loopq_compile.folders import replacing_folder
from loopq_compile.graph_json import graph_from_json, graph_to_json, rolled_from_json
from loopq_compile.loops import LoopStructure, LoopTag
from loopq_compile.scheme import Scheme
from loopq_compile.shapes import infer_shapes
from loopq_compile.signature import signature_from_dict, signature_to_dict
from loopq_compile.state import CompilerState, LogEntry, Site, attach_state, get_state, get_tensor

FORMAT, FORMAT_VERSION = "loopq_compile.program", 1
GRAPH_FILE, TENSOR_FILE = "program.json", "tensors.safetensors"


def save(
    graph_module: fx.GraphModule, directory: str | os.PathLike[str], extra_files: Mapping[str, str] | None = None
) -> None:
    """Writes a program; the folder appears when it is complete, or not at all.

    Args:
        graph_module: with its compiler state.
        directory: new, empty, or an earlier program, which is replaced.
        extra_files: text files by name to put beside it, such as `tokenizer.json`.

    Raises:
        LoopQError: the folder cannot be written, or the graph holds something that files cannot name.
    """
    description = _describe(graph_module)
    with replacing_folder(directory, GRAPH_FILE) as folder:
        try:
            save_file(_stored_tensors(graph_module, description["packed"]), folder / TENSOR_FILE)
        except SafetensorError as error:
            raise LoopQError(f"Cannot write {directory}: {error}") from error
        description["sha256"] = _digest(folder / TENSOR_FILE)
        (folder / GRAPH_FILE).write_text(json.dumps(description, indent=1), encoding="utf-8")
        for name, text in (extra_files or {}).items():
            (folder / name).write_text(text, encoding="utf-8")


def read(directory: str | os.PathLike[str]) -> fx.GraphModule:
    """The graph module, with its compiler state, of a program written by `save`.

    Raises:
        LoopQError: the folder is no program, was written by a newer version, or is damaged.
    """
    folder = Path(directory)
    try:
        data = json.loads((folder / GRAPH_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LoopQError(f"{folder} is no saved program: it has no {GRAPH_FILE}.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise LoopQError(f"{folder / GRAPH_FILE} cannot be read: {error}.") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise LoopQError(f"{folder / GRAPH_FILE} is not a loopq_compile program.")
    if data.get("version") != FORMAT_VERSION:
        raise LoopQError(
            f"{folder} has format version {data.get('version')!r} (written by loopq_compile "
            f"{data.get('loopq_compile')}); this version reads {FORMAT_VERSION}. Update loopq_compile."
        )
    tensors = _read_tensors(folder, data)
    try:
        return _rebuild(data, tensors)
    except LoopQError as error:
        raise LoopQError(f"{folder} is damaged: {error}") from error
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise LoopQError(f"{folder / GRAPH_FILE} is damaged: {type(error).__name__}: {error}.") from error


def _describe(graph_module: fx.GraphModule) -> dict[str, Any]:
    state = get_state(graph_module)
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "loopq_compile": loopq_compile.__version__,
        "torch": torch.__version__,
        "model": state.model_name,
        "signature": signature_to_dict(state.signature),
        "scheme": state.scheme.to_dict() if state.scheme else None,
        "method": state.method,
        "loops": state.loops.to_dict(),
        "tags": None if state.tags is None else {name: [tag.loops, tag.index] for name, tag in state.tags.items()},
        "sites": [dataclasses.asdict(site) for site in state.sites.values()],
        "log": [dataclasses.asdict(entry) for entry in state.log],
        "packed": _packed(graph_module),
        "nodes": graph_to_json(graph_module.graph),
    }


def _packed(graph_module: fx.GraphModule) -> dict[str, list[int]]:
    """Integer weights of at most 4 bits, which are stored two to the byte, with their shapes."""
    packed = {}
    for node in graph_module.graph.nodes:
        bits = node.meta.get("loopq_bits", 8)
        if node.op == "call_function" and bits <= 4 and node.args[0].op == "get_attr":
            shape = list(get_tensor(graph_module, str(node.args[0].target)).shape)
            if shape[-1] % 2 == 0:
                packed[str(node.args[0].target)] = shape
    return packed


def _stored_tensors(graph_module: fx.GraphModule, packed: Mapping[str, list[int]]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            name = str(node.target)
            tensor = get_tensor(graph_module, name).detach().cpu()
            if name in packed:
                low, high = tensor[..., ::2] & 15, tensor[..., 1::2] & 15
                tensor = (low | (high << 4)).view(torch.uint8)
            storage = tensor.untyped_storage()
            whole = tensor.is_contiguous() and storage.nbytes() == tensor.nbytes and storage._cdata not in storages
            tensors[name] = tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
            storages.add(storage._cdata)
    return tensors


def _unpack(stored: Tensor, shape: list[int]) -> Tensor:
    codes = torch.stack([stored & 15, stored >> 4], -1).flatten(-2).to(torch.int8)
    return torch.where(codes > 7, codes - 16, codes).reshape(shape)


def _read_tensors(folder: Path, data: Mapping[str, Any]) -> dict[str, Tensor]:
    path = folder / TENSOR_FILE
    try:
        if _digest(path) != data.get("sha256"):
            raise LoopQError(f"{path} does not match {GRAPH_FILE}: it was changed or cut off.")
        tensors = load_file(path)
        return {
            name: _unpack(tensor, data["packed"][name]) if name in data["packed"] else tensor
            for name, tensor in tensors.items()
        }
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise LoopQError(f"{path} cannot be read: {error}.") from error


def _rebuild(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    graph = graph_from_json(data["nodes"])
    missing = [node.target for node in graph.nodes if node.op == "get_attr" and node.target not in tensors]
    if missing:
        raise LoopQError(f"tensor {missing[0]!r} is missing.")
    graph_module = fx.GraphModule({**tensors, **rolled_from_json(data["nodes"])}, graph)
    state = CompilerState(
        signature=signature_from_dict(data["signature"]),
        model_name=data["model"],
        loops=LoopStructure.from_dict(data["loops"]),
        tags=None if data["tags"] is None else {name: LoopTag(*map(tuple, tag)) for name, tag in data["tags"].items()},
        scheme=Scheme(**data["scheme"]) if data["scheme"] else None,
        method=data["method"],
        sites={site["weight"]: Site(**{**site, "shape": tuple(site["shape"])}) for site in data["sites"]},
        log=[LogEntry(**entry) for entry in data["log"]],
    )
    attach_state(graph_module, state)
    graph_module.graph.lint()
    infer_shapes(graph_module)
    return graph_module


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
