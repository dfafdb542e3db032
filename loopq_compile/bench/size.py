"""Compiling a model of published size from end to end: seconds and memory of every step, bytes on disk and loaded."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import onnx

from loopq_compile.bench import session
from loopq_compile.bench.cells import Values
from loopq_compile.bench.random_models import sized
from loopq_compile.bench.results import Report
from loopq_compile.bench.size_session import Job, measure

COLUMNS = ("what", "seconds", "of a processor", "peak GiB", "GiB")


def size(
    name: str,
    scheme: str = "w4a4",
    layers: int | None = None,
    head_bits: int | None = 8,
    float_bits: int = 16,
    group_size: int = 32,
    *,
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Builds, captures, compiles and exports a model (`onnxruntime`, rolled, with a cache) in a separate process, and
    opens the file in another one.

    Args:
        name: one of `random_models.SIZES`.
        scheme: weights are rounded to nearest, without data.
        layers: number of layers, fewer than the model has, to try it out.
        head_bits, float_bits: options of the export.
        group_size: neighbouring features that share a scale.
        say: called with what is being done.

    Raises:
        LoopQError: the model is unknown, or a process failed.
    """
    config = sized(name, layers)
    with tempfile.TemporaryDirectory() as folder:
        say(f"compiling {name}, {config.num_hidden_layers} layers x {config.total_ut_steps} loops")
        steps = measure(Job(config.to_dict(), folder, scheme, head_bits, float_bits, group_size))
        path = Path(folder) / "model.onnx"
        parts = _parts(path)
        disk = sum(file.stat().st_size for file in Path(folder).iterdir())
        say("opening it")
        loaded = session.measure(path, 16)
    data: list[Values] = [{"what": step, **values} for step, values in steps.items()]
    total = {key: sum(x[key] for x in data) for key in ("seconds", "processor")}
    data.append({"what": "all together", **total, "peak": max(x["peak"] for x in data)})
    data += [{"what": part, "bytes": count} for part, count in parts.items()]
    data.append({"what": "on disk", "bytes": disk})
    data.append({"what": "loaded", "bytes": loaded["memory"], "seconds": loaded["load_ms"] / 1e3})
    notes = [
        "Random weights, rounded to nearest; export for onnxruntime, rolled, with a cache. Peak: the largest resident "
        "size of the process up to the end of a step. Loaded: what opening the file and calls of 1 x 16 tokens add.",
    ]
    title = (
        f"{name}, {config.num_hidden_layers} layers x {config.total_ut_steps} loops, {scheme}, groups of {group_size}"
    )
    return Report("size", title, COLUMNS, [_row(x) for x in data], data, notes=notes)


def _row(values: Values) -> tuple[str, ...]:
    seconds = (f"{values[key]:.1f}" if key in values else "" for key in ("seconds", "processor"))
    sizes = (f"{values[key] / 2**30:.3f}" if key in values else "" for key in ("peak", "bytes"))
    return (values["what"], *seconds, *sizes)


def _parts(path: Path) -> dict[str, int]:
    """Bytes of the file's tensors, by kind and type."""
    parts: dict[str, int] = {}
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        kind = onnx.TensorProto.DataType.Name(tensor.data_type)
        width = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        count = width
        for dimension in tensor.dims:
            count *= dimension
        what = next((what for mark, what in _KINDS.items() if mark in tensor.name), "everything else")
        key = f"{what}, {kind}"
        parts[key] = parts.get(key, 0) + count
    return dict(sorted(parts.items(), key=lambda item: -item[1]))


_KINDS = {
    "lm_head": "head",
    "embed_tokens": "embeddings",
    "codes.packed": "packed weights",
    ".scales": "scales of weights",
}
"""The kind of a tensor, by a part of its name; the first that fits."""
