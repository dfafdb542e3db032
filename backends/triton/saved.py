"""Lowered programs as folders: the fused program and its kernels, which are compiled ahead of time without a GPU.

Such a folder is a saved program (`loopq_compile.storage.artifact`: JSON, safetensors, a manifest) with two more files.
`kernels.json` lists every kernel as it is launched; `kernels.safetensors` holds what Triton stores of a compiled one.
`load` puts the kernels for the present GPU into Triton's cache, so that a launch finds them and nothing is compiled.
The name of an entry in that cache is a hash of the kernel's source, its constants, Triton itself and the compiler:
`load` recomputes it and skips entries that do not agree, so a folder can neither be stale nor replace other kernels.

A compiled kernel is code that the GPU runs. The manifest detects damage, not malice: only load kernels that you trust.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, fx
from triton.runtime.cache import get_cache_manager

from loopq_compile.backends.triton.ahead import ARCHITECTURES, Case, cache_key, check_architecture, compile_binary
from loopq_compile.backends.triton.copies import put_on
from loopq_compile.backends.triton.executable import TritonExecutable, device_for, fuse, use_kernels
from loopq_compile.backends.triton.kernels import KERNELS
from loopq_compile.backends.triton.launches import ROWS, launches
from loopq_compile.backends.triton.operators import INTERPRETED
from loopq_compile.backends.triton.static_decoder import step_of
from loopq_compile.errors import LoopQError, first_line
from loopq_compile.graph.caches import has_cache
from loopq_compile.graph.copies import private_copy
from loopq_compile.graph.rolled import rolled_loops
from loopq_compile.graph.state import get_state
from loopq_compile.storage import artifact
from loopq_compile.storage.atomic import check_folder
from loopq_compile.storage.manifest import PROGRAM, check_files, read_json

CASE_FILE, BINARY_FILE = "kernels.json", "kernels.safetensors"
_KEPT = ("json", "cubin")
"""What Triton needs of a compiled kernel: its description and its code."""


@dataclass(frozen=True)
class Saved:
    """What `save` wrote.

    Args:
        path: the folder.
        kernels: how many were compiled, over all architectures.
        architectures: the architectures they were compiled for.
        bytes: total size of all compiled kernels.
    """

    path: str
    kernels: int
    architectures: tuple[int, ...]
    bytes: int

    def __str__(self) -> str:
        targets = ", ".join(f"sm_{number}" for number in self.architectures)
        return f"{self.path}: {self.kernels} kernels compiled for {targets}, {self.bytes:,} bytes"


def save(
    program: Any,
    directory: str | os.PathLike[str],
    *,
    architectures: Sequence[int] = ARCHITECTURES,
    rolled: bool = False,
    extra_files: Mapping[str, str] | None = None,
) -> Saved:
    """Fuses a program, compiles its kernels, and writes both; needs no GPU.

    Args:
        program: as `lower` takes it.
        directory: any folder. An earlier program in it is replaced; everything else stays.
        architectures: compute capabilities times ten.
        rolled: as for `lower`.
        extra_files: text files by name to add to the folder, such as `tokenizer.json`.

    Raises:
        LoopQError: nothing can be fused, an architecture is unknown, or the folder cannot be written or holds a
            file of one of these names that is not ours.
    """
    for architecture in architectures:
        check_architecture(architecture)
    check_folder(directory, PROGRAM, (*artifact.FILES, CASE_FILE, BINARY_FILE, *(extra_files or {})))
    graph_module = fuse(program, rolled=rolled)
    graphs = _graphs(use_kernels(private_copy(graph_module)))
    entries: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for architecture in architectures:
        cases = [case for graph, rows in graphs for case in launches(graph, architecture, rows)]
        for key, case in {cache_key(case, architecture): case for case in cases}.items():
            entries.append({"key": key, "architecture": architecture, **_case_to_dict(case)})
            tensors |= {f"{key}.{kind}": data for kind, data in _binary(case, architecture).items()}
    described = json.dumps({"triton": triton.__version__, "kernels": entries}, indent=1)
    files: dict[str, str | bytes] = {**(extra_files or {}), CASE_FILE: described, BINARY_FILE: save_tensors(tensors)}
    artifact.save(graph_module, directory, files, card="triton")
    size = sum(tensor.nbytes for tensor in tensors.values())
    return Saved(str(directory), len(entries), tuple(architectures), size)


def _graphs(lowered: fx.GraphModule) -> list[tuple[fx.GraphModule, Sequence[int]]]:
    """The graphs that may run, and with how many tokens: the graph, and its step with fixed shapes if it has one."""
    if not has_cache(get_state(lowered).signature):
        return [(lowered, ROWS)]
    try:
        return [(lowered, ROWS), (step_of(lowered), (1,))]
    except LoopQError:  # positions are read in another way: such a program decodes only with a growing cache
        return [(lowered, ROWS)]


def load(
    directory: str | os.PathLike[str],
    *,
    kernels: bool = True,
    fallback: bool = False,
    device: str | torch.device | None = None,
) -> TritonExecutable:
    """The executable in a folder that `save` wrote; neither the model's code nor a compiler is needed.

    Args:
        directory: the folder.
        kernels: whether to use the compiled kernels in the folder, which the GPU runs as they are; False compiles
            again.
        fallback, device: as for `lower`.

    Raises:
        LoopQError: the folder is damaged or holds no lowered program, or no kernel can run here.
    """
    target = device_for(device, fallback)
    graph_module = artifact.read(directory)
    _check_lowered(Path(directory), graph_module)
    if kernels and target.type == "cuda":
        major, minor = torch.cuda.get_device_capability(target)
        install(directory, 10 * major + minor)
    runs_kernels = target.type == "cuda" or INTERPRETED
    if runs_kernels:
        use_kernels(graph_module)
    return TritonExecutable(put_on(graph_module, target), target, runs_kernels).to(target)


def install(directory: str | os.PathLike[str], architecture: int) -> int:
    """Puts the kernels of a folder for one architecture into Triton's cache.

    Warns if another version of Triton or of this package compiled some of these kernels. No launch would ask for them,
    so they are skipped, and launches compile their own.

    Returns:
        How many of them are in the cache now.

    Raises:
        LoopQError: the files are damaged, or the cache cannot be written.
    """
    folder = Path(directory)
    check_files(folder, (CASE_FILE, BINARY_FILE))
    data = read_json(folder / CASE_FILE)
    try:
        tensors = load_tensors((folder / BINARY_FILE).read_bytes())
        entries = [entry for entry in data["kernels"] if entry["architecture"] == architecture]
        stale = [entry for entry in entries if not _install(entry, tensors)]
    except LoopQError:
        raise
    except Exception as error:  # untrusted data; JSON, safetensors and Triton raise many kinds of errors
        raise LoopQError(f"The kernels in {folder} cannot be used: {first_line(error)}.") from error
    if stale:
        warnings.warn(
            f"{len(stale)} of {len(entries)} kernels in {folder} were compiled with Triton {data.get('triton')} or "
            f"another version of loopq_compile, not with Triton {triton.__version__}: they are compiled at their first "
            "launch. Export the program again to avoid that.",
            stacklevel=2,
        )
    return len(entries) - len(stale)


def _install(entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """False if the entry is not the kernel that a launch would ask for."""
    case = _case_from_dict(entry)
    key = cache_key(case, entry["architecture"])
    if key != entry["key"]:
        return False
    manager, name = get_cache_manager(key), case.kernel.fn.__name__
    if manager.get_group(f"{name}.json") is None:
        files = {}
        for kind in _KEPT:
            content = tensors[f"{key}.{kind}"].numpy().tobytes()
            files[f"{name}.{kind}"] = manager.put(content, f"{name}.{kind}", binary=True)
        manager.put_group(f"{name}.json", files)
    return True


def _binary(case: Case, architecture: int) -> dict[str, Tensor]:
    """What Triton wrote into its cache for a compiled case."""
    files = compile_binary(case, architecture).metadata_group
    paths = {path.suffix[1:]: path for path in map(Path, files.values())}
    return {kind: torch.frombuffer(bytearray(paths[kind].read_bytes()), dtype=torch.uint8) for kind in _KEPT}


def _case_to_dict(case: Case) -> dict[str, Any]:
    fields = {name: value for name, value in vars(case).items() if name not in ("kernel", "constants", "products")}
    constants = {name: {"dtype": str(v)} if isinstance(v, tl.dtype) else v for name, v in case.constants.items()}
    return fields | {"constants": constants}


def _case_from_dict(data: Mapping[str, Any]) -> Case:
    """Inverse of `_case_to_dict`; the name is that of one of our kernels."""
    kernel = KERNELS[data["name"]]
    constants = {n: tl.dtype(str(v["dtype"])) if isinstance(v, dict) else v for n, v in data["constants"].items()}
    return Case(
        data["name"],
        kernel,
        dict(data["types"]),
        constants,
        int(data["warps"]),
        int(data["stages"]),
        tuple(data["aligned"]),
    )


def _check_lowered(folder: Path, graph_module: fx.GraphModule) -> None:
    graphs = [graph_module.graph, *(loop.body.graph for loop in rolled_loops(graph_module))]
    names = {str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_function"}
    if not any(name.startswith("loopq.packed_linear") for name in names):
        raise LoopQError(
            f"{folder} holds no lowered program; write one with `loopq-compile export DIR --target triton --out OUT`."
        )
