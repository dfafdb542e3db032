"""From a program to a folder that transformers and vLLM load."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from loopq_compile.backends.compressed_tensors.configuration import ENGINE, Grid, find_grids, quantization_config
from loopq_compile.backends.compressed_tensors.skeleton import Skeleton, build_skeleton
from loopq_compile.backends.compressed_tensors.source import Source
from loopq_compile.backends.compressed_tensors.tensors import TensorWriter, check_places
from loopq_compile.backends.compressed_tensors.verify import CONFIG_FILE, KIND
from loopq_compile.backends.plain import plain_linears
from loopq_compile.errors import LoopQError, did_you_mean
from loopq_compile.graph.state import get_state
from loopq_compile.storage.atomic import check_folder, writing_folder
from loopq_compile.storage.card import write_card

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SHARD = "5GB"


@dataclass(frozen=True)
class HuggingFaceExport:
    """What was written.

    Args:
        path, bytes: the folder, and the size of its weights.
        grids: how many linears are quantized in which way, such as `W4A16 in groups of 32`.
        ignored: how many linears stay in floating point.
        dtype: type of scales and of what is not quantized.
        scale_change: the largest change of a scale that `dtype` made, relative to it; 0 if scales went in unchanged.
        copies: how many linears are stored again because the engine's model does not share them.
        remarks: what keeps vLLM, by its documents, from running this.
    """

    path: Path
    bytes: int
    grids: dict[str, int]
    ignored: int
    dtype: str
    scale_change: float
    copies: int
    remarks: tuple[str, ...]

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} linears {kind}" for kind, count in self.grids.items())
        lines = [f"{self.path}: {self.bytes:,} bytes, {kinds}, {self.ignored} linears and all else in {self.dtype}"]
        if self.scale_change:
            lines.append(f"scales were rounded to {self.dtype}, by up to {self.scale_change:.1e}")
        if self.copies:
            lines.append(f"{self.copies} linears are stored again, since this class of models does not share layers")
        return "\n".join([*lines, *self.remarks])


def export(
    graph_module: fx.GraphModule,
    directory: str | os.PathLike[str],
    *,
    source: nn.Module | str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    zero_points: bool = False,
    trust_remote_code: bool = False,
) -> HuggingFaceExport:
    """Writes a program as a folder of transformers; see `Program.export_hugging_face`."""
    if dtype is not None and dtype not in _DTYPES:
        raise LoopQError(f"dtype={dtype!r} is unknown.{did_you_mean(str(dtype), list(_DTYPES))}")
    state = get_state(graph_module)
    linears = plain_linears(graph_module, ENGINE, "a compressed-tensors folder")
    grids = find_grids(linears, zero_points)
    given = source if source is not None else state.origin.name or None
    name = given if isinstance(given, nn.Module | None) else os.fspath(given)
    origin = Source(name, trust_remote_code, source is not None)
    check_folder(directory, KIND, [CONFIG_FILE, "model.safetensors"])
    skeleton = build_skeleton(state, origin, set(grids))
    check_places(graph_module, skeleton)
    made = TensorWriter(graph_module, linears, grids, None if dtype is None else _DTYPES[dtype])
    made.add_all(skeleton, origin)
    ignored = [name for name in skeleton.linears if name not in made.grids]
    config, kept = _settings(skeleton, state.model_name, made, ignored, dtype)
    with writing_folder(directory, KIND) as folder:
        _save(made, folder)
        (folder / CONFIG_FILE).write_text(config, encoding="utf-8")
        for file in origin.code_files(state.origin):
            shutil.copyfile(file, folder / file.name)
        origin.copy_settings(folder, None if tokenizer is None else Path(tokenizer))
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    write_card(directory, state, ENGINE)
    copies = len(made.grids) - len({id(linear) for linear in linears})
    kinds = Counter(made.grids.values())
    return HuggingFaceExport(
        path=Path(directory),
        bytes=size,
        grids={str(kind): count for kind, count in kinds.items()},
        ignored=len(ignored),
        dtype=kept,
        scale_change=made.change,
        copies=copies,
        remarks=_remarks(kinds),
    )


def _settings(
    skeleton: Skeleton, name: str, made: TensorWriter, ignored: list[str], dtype: str | None
) -> tuple[str, str]:
    """The text of `config.json`, and the type in it."""
    config: Any = skeleton.config
    types = Counter(str(t.dtype).removeprefix("torch.") for t in made.tensors.values() if t.is_floating_point())
    kept = dtype or types.most_common(1)[0][0]
    config.architectures = [name]
    config.dtype = kept
    config.quantization_config = quantization_config(made.grids, ignored)
    return config.to_json_string(), kept


def _save(made: TensorWriter, folder: Path) -> None:
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(made.tensors, folder, max_shard_size=_SHARD, metadata={"format": "pt"})


def _remarks(kinds: Counter[Grid]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(remark for kind in kinds for remark in kind.remarks()))
