"""Exported folders whose integrity can be checked: a manifest next to the model, and checks of untrusted files.

ONNX files name the files that hold their weights, so an untrusted file could make a runtime read anything. Before one
is opened, every such name must be the plain name of a regular file in the same folder, long enough for its tensors.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import mmap
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import ml_dtypes  # noqa: F401  (numpy types of ONNX's small floats)
import numpy as np
import onnx
from onnx import numpy_helper

from loopq_compile.backends.onnx.convention import METADATA_KEY, from_json
from loopq_compile.errors import LoopQError, first_line
from loopq_compile.storage.artifact import Verified
from loopq_compile.storage.atomic import settle
from loopq_compile.storage.card import CARD_FILE
from loopq_compile.storage.manifest import ManifestKind, check_files, check_name, check_regular, read_json

MODEL_FILE, DATA_FILE = "model.onnx", "model.onnx.data"
KIND = ManifestKind("onnx_manifest.json", "loopq_compile.onnx", 1, "export")
_PACKAGES = ("torch", "onnx", "onnxruntime")


def versions() -> dict[str, dict[str, str]]:
    """What a manifest says about the packages that made an export."""
    found = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return {"versions": found}


def verify(directory: Path) -> Verified:
    """Reads an exported folder; checks that files are intact, references stay inside, the model is valid and has no
    NaN.

    Raises:
        LoopQError: one line that says what is wrong.
    """
    settle(directory)
    records = check_files(directory, (MODEL_FILE,), KIND)
    path = directory / MODEL_FILE
    if records is None:
        raise LoopQError(f"{directory} has no {KIND.file} to compare {MODEL_FILE} with; export the program again.")
    model = check_model_file(path)
    for tensor in _tensors(model.graph):
        for entry in tensor.external_data:
            if entry.key == "location" and entry.value not in records:
                raise LoopQError(f"{path} is refused: {KIND.file} does not list {entry.value!r}, where it has weights.")
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    if METADATA_KEY not in metadata:
        raise LoopQError(f"{path} is damaged: it does not say how it is called.")
    from_json(metadata[METADATA_KEY])
    _check_values(path, model)
    _check_nodes(path, model)
    here = {file.name for file in directory.iterdir()} - set(records) - {KIND.file, CARD_FILE}
    return Verified(
        directory=str(directory),
        version=read_json(directory / KIND.file)["version"],
        files=tuple(records.values()),
        unlisted=tuple(sorted(here)),
        description=metadata.get("loopq.program", "no description"),
        nodes=sum(len(graph.node) for graph in _graphs(model.graph)),
        tensors=sum(1 for _ in _tensors(model.graph)),
    )


def check_model_file(path: Path) -> onnx.ModelProto:
    """Reads a model file and checks its references to other files, without reading those.

    Raises:
        LoopQError: it is not an ONNX model, or its weights lie outside its folder, are cut off, or are not in a regular
            file.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's own classes, from C++
        raise LoopQError(f"{path} is damaged: {first_line(error)}.") from error
    for tensor in _tensors(model.graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            _check_reference(path, tensor)
    for function in model.functions:
        for tensor in _node_tensors(function.node):
            if tensor.external_data:
                raise LoopQError(f"{path} is refused: a function has weights in another file.")
    return model


def check_references(path: Path) -> None:
    """Like `check_model_file`, but a file that names no other costs only a search, however large its own weights are.

    The model itself may be a link, as in the cache of a hub; files that it names may not.

    Raises:
        LoopQError: as there, or it is not a file.
    """
    if not path.is_file():
        raise LoopQError(f"{path} is not a file.")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            refers = content.find(b"location") != -1  # the key for the name of a file, in any encoding
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise LoopQError(f"{path} is damaged: {first_line(error)}.") from error
    if refers:
        check_model_file(path)


def _check_reference(path: Path, tensor: onnx.TensorProto) -> None:
    about = {entry.key: entry.value for entry in tensor.external_data}
    try:
        name = check_name(about.get("location"))
    except LoopQError as error:
        raise LoopQError(f"{path} is refused: weight {tensor.name[:80]!r} lies elsewhere: {error}") from error
    file = path.with_name(name)
    check_regular(file)
    size = file.stat().st_size
    try:
        offset = int(about.get("offset", 0))
        length = int(about.get("length", size - offset))
    except ValueError as error:
        raise LoopQError(f"{path} is damaged: weight {tensor.name[:80]!r}: {first_line(error)}.") from error
    if offset < 0 or length < 0 or offset + length > size:
        raise LoopQError(
            f"{file} is cut off: it has {size:,} bytes, and weight {tensor.name[:80]!r} ends at {offset + length:,}."
        )


def _check_values(path: Path, model: onnx.ModelProto) -> None:
    """Checks that every tensor has as many numbers as its shape says, and that no floating-point number is NaN."""
    for tensor in _tensors(model.graph):
        try:
            values = numpy_helper.to_array(_with_numbers(path, tensor))
        except Exception as error:  # sizes that do not fit, unknown types
            raise LoopQError(f"{path} is damaged: tensor {tensor.name[:80]!r}: {first_line(error)}.") from error
        # An attention mask adds -inf; no weight, scale or table has a NaN.
        if values.dtype.kind in "fV" and np.isnan(values.astype(np.float32)).any():
            raise LoopQError(f"{path} is damaged: tensor {tensor.name[:80]!r} holds NaN.")


def _with_numbers(path: Path, tensor: onnx.TensorProto) -> onnx.TensorProto:
    """The tensor itself, or a copy with its data from another file, whose name and size were checked.

    onnx's own reader refuses every link, also the hard links that backups and the cache of the hub make.
    """
    if not tensor.external_data:
        return tensor
    about = {entry.key: entry.value for entry in tensor.external_data}
    copy = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    with path.with_name(about["location"]).open("rb") as file:
        file.seek(int(about.get("offset", 0)))
        copy.raw_data = file.read(int(about["length"])) if "length" in about else file.read()
    return copy


def _check_nodes(path: Path, model: onnx.ModelProto) -> None:
    """Runs the ONNX checker. It only needs other files to exist, so an empty file of the right size is enough."""
    names = {entry.value for t in _tensors(model.graph) for entry in t.external_data if entry.key == "location"}
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name in names:
                with (Path(folder) / name).open("wb") as file:
                    file.truncate(path.with_name(name).stat().st_size)
            beside = Path(folder) / MODEL_FILE
            if names:
                beside.write_bytes(path.read_bytes())
            onnx.checker.check_model(str(beside if names else path))
    except Exception as error:  # an untrusted file: the checker's C++ may raise anything
        raise LoopQError(f"{path} is damaged: {first_line(error)}.") from error


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                yield from _graphs(inner)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    for part in _graphs(graph):
        yield from part.initializer
        for sparse in part.sparse_initializer:
            yield from (sparse.values, sparse.indices)
        yield from _node_tensors(part.node)


def _node_tensors(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from [*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors]
