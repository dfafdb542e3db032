"""Saved programs: a folder with `program.json` (graph, loops, scheme, log), `tensors.safetensors` and `manifest.json`.

Files are untrusted: nothing is unpickled or executed, and every problem is a `LoopQError`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, fx

from loopq_compile._version import __version__
from loopq_compile.errors import InternalError, LoopQError, first_line
from loopq_compile.graph.keys import BITS, GROUP, LEARN, MADE_BY, TRANSFORM
from loopq_compile.graph.loops import LoopStructure, LoopTag
from loopq_compile.graph.names import safe_name, shown_name
from loopq_compile.graph.origin import Origin
from loopq_compile.graph.scheme import Scheme
from loopq_compile.graph.shapes import infer_shapes
from loopq_compile.graph.signature import signature_from_dict, signature_to_dict
from loopq_compile.graph.state import CompilerState, LogEntry, Site, attach_state, get_state, get_tensor
from loopq_compile.graph.verify import verify_tags
from loopq_compile.processes import first_only
from loopq_compile.storage.atomic import check_folder, settle, writing_folder
from loopq_compile.storage.card import CARD_FILE, write_card
from loopq_compile.storage.conform import conform
from loopq_compile.storage.evaluation import add_figures, read_figures
from loopq_compile.storage.graph_json import graph_from_json, graph_to_json, rolled_from_json
from loopq_compile.storage.hub_config import hub_config
from loopq_compile.storage.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    PROGRAM,
    FileRecord,
    check_files,
    check_name,
    check_regular,
    check_version,
    digest,
    read_json,
)

FORMAT = "loopq_compile.program"
GRAPH_FILE, TENSOR_FILE = FILES = "program.json", "tensors.safetensors"
_LARGEST_HEADER = 100_000_000
"""Bytes; safetensors itself refuses larger ones."""


@first_only
def save(
    graph_module: fx.GraphModule,
    directory: str | os.PathLike[str],
    extra_files: Mapping[str, str | bytes] | None = None,
    card: str = "program",
) -> None:
    """Writes a program; the folder appears only when it is complete.

    Args:
        graph_module: the graph with its compiler state.
        directory: any folder. An earlier program in it is replaced; everything else stays. Under `torchrun` only the
            first process writes.
        extra_files: files by name to add, such as `tokenizer.json`; text is written as UTF-8.
        card: what the model card is about, a key of `loopq_compile.storage.recipes.RECIPES`.

    Raises:
        LoopQError: the folder cannot be written, or holds a file with one of these names that is not ours; the graph
            holds something that files cannot name; or a tensor holds NaN.
    """
    given = {**hub_config(get_state(graph_module), directory), **(extra_files or {})}
    extra = {check_name(name): content for name, content in given.items()}
    check_folder(directory, PROGRAM, (*FILES, *extra))
    description = _describe(graph_module)
    tensors = _stored_tensors(graph_module, description["packed"])
    check_values(graph_module.graph, tensors)
    description["tensors"] = {name: _kind(tensor) for name, tensor in tensors.items()}
    with writing_folder(directory, PROGRAM) as folder:
        try:
            save_file(tensors, folder / TENSOR_FILE)
        except SafetensorError as error:
            raise LoopQError(f"Cannot write {directory}: {error}") from error
        description["sha256"] = digest(folder / TENSOR_FILE)[1]
        (folder / GRAPH_FILE).write_text(json.dumps(description, indent=1), encoding="utf-8")
        for name, content in extra.items():
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    if get_state(graph_module).figures:
        add_figures(directory, get_state(graph_module).figures)
    write_card(directory, get_state(graph_module), card)


def read(directory: str | os.PathLike[str]) -> fx.GraphModule:
    """The graph module, with its compiler state, of a program written by `save`.

    Raises:
        LoopQError: the folder is not a program, was written by a newer version, or is damaged.
    """
    folder = Path(directory)
    settle(folder)
    if not (folder / GRAPH_FILE).is_file():
        raise LoopQError(
            f"{folder} is not a saved program: it has no {GRAPH_FILE}. `loopq-compile compile` writes one."
        )
    records = check_files(folder, (GRAPH_FILE, TENSOR_FILE))
    data = read_json(folder / GRAPH_FILE)
    if data.get("format") != FORMAT:
        raise LoopQError(f"{folder / GRAPH_FILE} is not a loopq_compile program.")
    check_version(folder, data)
    if records is None and data["version"] > 1:
        raise LoopQError(f"{folder} is damaged: it has no {MANIFEST_FILE}.")
    tensors = _read_tensors(folder, data)
    try:
        graph_module = _rebuild(data, tensors)
        get_state(graph_module).figures = read_figures(folder)
        return graph_module
    except LoopQError as error:
        raise LoopQError(f"{folder} is damaged: {first_line(error)}.") from error
    except Exception as error:  # untrusted data: PyTorch may raise anything for a nonsensical graph
        raise LoopQError(f"{folder / GRAPH_FILE} is damaged: {type(error).__name__}: {first_line(error)}.") from error


@dataclasses.dataclass(frozen=True)
class Verified:
    """What `verify` found in an intact folder.

    Args:
        directory: the folder.
        version: version of the format.
        files: files that the manifest lists; for version 1, which has no manifest, its fixed files.
        unlisted: names of other items in the folder, which nothing reads.
        description: model, loops, scheme and method in one line.
        nodes, tensors: how many the program has.
    """

    directory: str
    version: int
    files: tuple[FileRecord, ...]
    unlisted: tuple[str, ...]
    description: str
    nodes: int
    tensors: int


def verify(directory: str | os.PathLike[str]) -> Verified:
    """Reads a program as `read` does and proves its loop tags: files intact, tables finite, graph valid.

    Raises:
        LoopQError: as `read`, or a node inside a loop has lost its tag.
    """
    folder = Path(directory)
    graph_module = read(folder)
    try:
        verify_tags(graph_module)
    except InternalError as error:
        raise LoopQError(f"{folder} is damaged: {first_line(error)}.") from error
    state, data = get_state(graph_module), read_json(folder / GRAPH_FILE)
    records = check_files(folder, ())
    if records is None:
        records = {name: FileRecord(name, *digest(folder / name)) for name in (GRAPH_FILE, TENSOR_FILE)}
    here = {path.name for path in folder.iterdir()} - set(records) - {MANIFEST_FILE, CARD_FILE}
    scheme = f"; {state.scheme.name} {state.scheme.activation}, method {state.method}" if state.scheme else ""
    return Verified(
        directory=str(folder),
        version=data["version"],
        files=tuple(records.values()),
        unlisted=tuple(sorted(here)),
        description=f"{state.model_name}: {state.loops.describe()}{scheme}",
        nodes=len(graph_module.graph.nodes),
        tensors=sum(node.op == "get_attr" for node in graph_module.graph.nodes),
    )


def _describe(graph_module: fx.GraphModule) -> dict[str, Any]:
    state = get_state(graph_module)
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "readable_from": FORMAT_VERSION,
        "loopq_compile": __version__,
        "torch": torch.__version__,
        "model": state.model_name,
        "origin": _plain(state.origin.to_dict()),
        "signature": signature_to_dict(state.signature),
        "scheme": state.scheme.to_dict() if state.scheme else None,
        "method": state.method,
        "loops": state.loops.to_dict(),
        "tags": None if state.tags is None else {name: [tag.loops, tag.index] for name, tag in state.tags.items()},
        "sites": [{**dataclasses.asdict(s), "weight": shown_name(s.weight)} for s in state.sites.values()],
        "results": _plain(state.results),
        "log": [dataclasses.asdict(entry) for entry in state.log],
        "packed": _packed(graph_module),
        "nodes": graph_to_json(graph_module.graph),
    }


def _packed(graph_module: fx.GraphModule) -> dict[str, list[int]]:
    """Integer weights of at most 4 bits, stored two per byte, with their shapes."""
    packed = {}
    for node in graph_module.graph.nodes:
        bits = node.meta.get(BITS, 8)
        if node.op == "call_function" and bits <= 4 and node.args[0].op == "get_attr":
            shape = list(get_tensor(graph_module, str(node.args[0].target)).shape)
            if shape[-1] % 2 == 0:
                packed[shown_name(str(node.args[0].target))] = shape
    return packed


def _stored_tensors(graph_module: fx.GraphModule, packed: Mapping[str, list[int]]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            name = shown_name(str(node.target))
            tensor = get_tensor(graph_module, str(node.target)).detach().cpu()
            if name in packed:
                low, high = tensor[..., ::2] & 15, tensor[..., 1::2] & 15
                tensor = (low | (high << 4)).view(torch.uint8)
            storage = tensor.untyped_storage()
            whole = tensor.is_contiguous() and storage.nbytes() == tensor.nbytes and storage._cdata not in storages
            tensors[name] = tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
            storages.add(storage._cdata)
    return tensors


def _unpack(stored: Tensor, shape: list[int]) -> Tensor:
    if stored.dtype != torch.uint8:
        raise LoopQError(f"packed integers must be uint8, not {stored.dtype}")
    codes = torch.stack([stored & 15, stored >> 4], -1).flatten(-2).to(torch.int8)
    return torch.where(codes > 7, codes - 16, codes).reshape(shape)


def _plain(value: Any) -> Any:
    """Values for JSON: numbers that are not finite become None, types that JSON lacks become text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _kind(tensor: Tensor) -> list[Any]:
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]


def check_values(graph: fx.Graph, tensors: Mapping[str, Tensor]) -> None:
    """Refuses NaN everywhere, and infinities in tensors that quantization added; masks of a model may hold infinities.

    Raises:
        LoopQError: names the tensor.
    """
    tables = {shown_name(str(node.target)) for node in graph.nodes if node.op == "get_attr" and _is_table(node)}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        finite = torch.isfinite(tensor).all()
        if not finite and (name in tables or torch.isnan(tensor).any()):
            raise LoopQError(f"tensor {name!r} holds {'NaN' if torch.isnan(tensor).any() else 'infinite values'}")


def _is_table(node: fx.Node) -> bool:
    """Whether quantization added a stored tensor: ranges, clip ratios, scales, transforms, adapters."""
    made = any(node.meta.get(key) for key in (GROUP, TRANSFORM, LEARN, MADE_BY))
    return made or str(node.target).endswith(("_scale", "_clip"))


def _read_tensors(folder: Path, data: Mapping[str, Any]) -> dict[str, Tensor]:
    path = folder / TENSOR_FILE
    check_regular(path)
    try:
        _check_header(path)
        if digest(path)[1] != data.get("sha256"):
            raise LoopQError(f"{path} does not match {GRAPH_FILE}: it was changed or cut off.")
        tensors = load_file(path)
        for name, kind in data.get("tensors", {}).items():
            if name not in tensors or _kind(tensors[name]) != kind:
                found = _kind(tensors[name]) if name in tensors else "missing"
                raise LoopQError(f"{path} is damaged: tensor {name!r} should be {kind} and is {found}.")
        return {
            name: _unpack(tensor, data["packed"][name]) if name in data["packed"] else tensor
            for name, tensor in tensors.items()
        }
    except LoopQError:
        raise
    except Exception as error:  # untrusted data; safetensors and torch raise many kinds of errors
        raise LoopQError(f"{path} cannot be read: {first_line(error)}.") from error


def _check_header(path: Path) -> None:
    """Checks the length of a safetensors header, which the first eight bytes give (little-endian)."""
    with path.open("rb") as file:
        length, size = int.from_bytes(file.read(8), "little"), path.stat().st_size
    if length > min(_LARGEST_HEADER, max(0, size - 8)):
        raise LoopQError(
            f"{path} is damaged: its header claims {length:,} bytes, of a file of {size:,} (at most "
            f"{_LARGEST_HEADER:,} are allowed)."
        )


def _rebuild(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    graph = graph_from_json(data["nodes"])
    for node in graph.nodes:
        if node.op == "get_attr" and shown_name(str(node.target)) not in tensors:
            raise LoopQError(f"tensor {shown_name(str(node.target))!r} is missing")
    check_values(graph, tensors)
    held = {safe_name(name): tensor for name, tensor in tensors.items()}
    graph_module = fx.GraphModule({**held, **rolled_from_json(data["nodes"])}, graph)
    state = CompilerState(
        signature=signature_from_dict(data["signature"]),
        model_name=str(data["model"]),
        origin=Origin.from_dict(data.get("origin")),
        loops=LoopStructure.from_dict(data["loops"]),
        tags=None if data["tags"] is None else {name: LoopTag(*map(tuple, tag)) for name, tag in data["tags"].items()},
        scheme=Scheme(**_known(Scheme, data["scheme"])) if data["scheme"] else None,
        method=str(data["method"]),
        sites={safe_name(site["weight"]): _site(site) for site in data["sites"]},
        results=dict(data.get("results", {})),
        log=[LogEntry(**_known(LogEntry, entry)) for entry in data["log"]],
    )
    for part in (state.loops, *(state.tags or {}).values(), *state.sites.values(), *state.log):
        conform(part)
    attach_state(graph_module, state)
    graph_module.graph.lint()
    infer_shapes(graph_module)
    return graph_module


def _site(data: Mapping[str, Any]) -> Site:
    fields = _known(Site, data)
    return Site(**{**fields, "weight": safe_name(fields["weight"]), "shape": tuple(fields["shape"])})


def _known(kind: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that this version knows; newer versions add fields that older readers may ignore (`readable_from`)."""
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: value for name, value in data.items() if name in names}
