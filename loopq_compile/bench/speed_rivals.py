"""The other engines in `bench speed`: what each is called, and how its file is made."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from loopq_compile.backends.openvino.folder import MODEL_FILE
from loopq_compile.bench import speed_llamacpp, speed_openvino
from loopq_compile.bench.cells import Values
from loopq_compile.bench.speed_contest import Contestant
from loopq_compile.bench.speed_session import Job, load
from loopq_compile.compiler import compile as compile_model
from loopq_compile.graph.scheme import Scheme
from loopq_compile.program import Program

RIVALS: Mapping[str, Mapping[str, str]] = {
    "openvino": {"openvino": "openvino", "nncf": "nncf"},
    "llamacpp": {"llama_cpp": "llama-cpp-python", "gguf": "gguf"},
}
"""Modules that each needs, with the names of their packages. An extra of our package has the rival's name."""


def missing(rival: str) -> str | None:
    """A sentence if a rival is not installed."""
    absent = [package for module, package in RIVALS[rival].items() if importlib.util.find_spec(module) is None]
    if not absent:
        return None
    return f"There is no {rival} row: {absent[0]} is not installed (pip install 'loopq-compile[{rival}]')."


def versions(rival: str) -> str:
    """The packages of a rival with their versions."""
    return ", ".join(f"{package} {version(package)}" for package in RIVALS[rival].values())


def contestants(
    rival: str, job: Job, group_size: int, head_bits: Sequence[int | None], program: Callable[[], Program]
) -> list[Contestant]:
    """The rows of a rival.

    Args:
        rival: a name of `RIVALS` that is installed.
        job: the model.
        group_size: neighbouring weights that share a scale.
        head_bits: of our files. Engines do not leave a head in floating point: those of OpenVINO have 8 bits, and also
            4 if ours have; that of llama.cpp has 8.
        program: makes the model's program in full precision.
    """
    group, engine = f" g{group_size}" if group_size != 32 else "", versions(rival)
    if rival == "llamacpp":
        way = speed_llamacpp.WAY
        return [Contestant(f"llama.cpp Q4_0{group}, head w8", "GGUF", way, _gguf(job, group_size), engine=engine)]
    found = []
    for bits in (8, *((4,) if 4 in head_bits else ())):
        write = partial(_compressed, program, group_size, bits)
        found += in_openvino(f"OpenVINO int4{group}, head w{bits}", write, engine)
    return found


def in_openvino(runs: str, write: Callable[[Path], tuple[str, Values]], engine: str) -> list[Contestant]:
    """A row for each way in which OpenVINO runs the file that `write` makes."""
    forms = {"openvino": "OpenVINO", "openvino float32": "OpenVINO float32"}
    return [
        Contestant(runs, forms[way], way, write, shares=f"{runs} in OpenVINO", engine=engine)
        for way in speed_openvino.WAYS
    ]


def _compressed(program: Callable[[], Program], group_size: int, bits: int, folder: Path) -> tuple[str, Values]:
    source, file = folder / "source", folder / MODEL_FILE
    program().export_openvino(source, last_token=True)
    speed_openvino.write(source / MODEL_FILE, file, group_size, bits)
    shutil.rmtree(source)
    return file.name, {"bytes": sum(path.stat().st_size for path in folder.iterdir())}


def _gguf(job: Job, group_size: int) -> Callable[[Path], tuple[str, Values]]:
    def write(folder: Path) -> tuple[str, Values]:
        from loopq_compile.backends.gguf.architectures import find_architecture

        model = load(job)
        find_architecture(type(model).__name__)  # refused before the model is compiled
        example: Any = None if hasattr(model, "prepare_inputs_for_generation") else torch.ones(2, 8, dtype=torch.int64)
        config, scheme = model.config, Scheme.parse("w4a16", group_size=group_size)
        program = compile_model(model, example, scheme=scheme, method="symmetric", release_model=True)
        return "model.gguf", {"bytes": program.export_gguf(folder / "model.gguf", config=config).bytes}

    return write
