"""Time and peak memory of a calibration by pass, predicted and measured, and bytes for every quantized weight."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from loopq_compile.bench.memory_session import Job, measure
from loopq_compile.bench.random_models import sized
from loopq_compile.bench.results import Report
from loopq_compile.errors import LoopQError
from loopq_compile.models import OuroConfig

_HEAD = 64
"""Features of an attention head."""


def memory(
    width: int = 1024,
    layers: Sequence[int] = (2, 4),
    loops: int = 3,
    scheme: str = "w4a4",
    method: str = "loopq",
    steps: int = 4,
    samples: int = 8,
    length: int = 64,
    options: Mapping[str, Any] | None = None,
    processes: int = 1,
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Calibrates models of several depths with random weights, each in its own process.

    Args:
        width: features of the residual stream, a multiple of 64.
        layers: numbers of layers; at least two, for a slope.
        loops: times that the layers run.
        scheme, method: as for `loopq_compile.compile`.
        steps: optimizer steps over all phases.
        samples, length: calibration rows, and tokens in each.
        options: further options of `loopq_compile.compile`.
        processes: how many processes share each calibration, by `torchrun`; a peak is then the largest of them.
        say: called with what is being done.

    Raises:
        LoopQError: an argument is out of range, or a process failed.
    """
    if width < _HEAD or width % _HEAD:
        raise LoopQError(f"width={width} is not a multiple of {_HEAD}.")
    if len(set(layers)) < 2:
        raise LoopQError("Name at least two numbers of layers, such as 2,4: the result is a slope.")
    runs: list[list[dict[str, Any]]] = []
    counts = sorted(set(layers))
    for count in counts:
        config = _config(width, count, loops).to_dict()
        job = Job(config, scheme, method, steps, samples, length, dict(options or {}), processes=processes)
        say(f"{count} layers x {loops} loops, width {width}, predicted:")
        predicted = measure(replace(job, rehearse=True, processes=1), say)
        say("measured:")
        runs += [predicted, measure(job, say)]
    weights = [run[0]["weights"] for run in runs[1::2]]
    data = []
    for lines in zip(*(run[1:] for run in runs), strict=True):
        peaks, seconds = ([line[key] for line in lines] for key in ("peak", "seconds"))
        data.append(
            {
                "pass": lines[0]["pass"],
                "seconds": seconds[1::2],
                "predicted_seconds": seconds[::2],
                "peaks": peaks[1::2],
                "predicted_peaks": peaks[::2],
                "bytes": (peaks[-1] - peaks[1]) / (weights[-1] - weights[0]),
            }
        )
    columns = (
        "pass",
        *(f"{count} layers, s" for count in counts),
        *(f"{count} layers, MiB" for count in counts),
        "bytes a weight",
    )
    notes = [
        f"Predicted by the dry run / measured. Peak resident memory while a pass runs, without the float32 model (4 "
        f"bytes a weight) that lies there before. {steps} steps, {samples} rows of {length} tokens. Bytes a weight: "
        "the difference of measured peaks between the deepest and the shallowest model, for each weight of its layers."
    ]
    title = f"{method} {scheme}, width {width}, {loops} loops"
    if processes > 1:
        title += f", {processes} processes"
        notes.append("Peaks are those of the largest process; the prediction is for a single one.")
    return Report("memory", title, columns, [_row(line) for line in data], data, notes=notes)


def memory_of(
    name: str,
    layers: int | None = None,
    scheme: str = "w4a4",
    method: str = "loopq",
    steps: int = 24,
    samples: int = 8,
    length: int = 512,
    options: Mapping[str, Any] | None = None,
    *,
    dtype: str = "float32",
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Calibrates a model of published size with random weights and exports it (`onnxruntime`, rolled, with a cache), in
    a separate process. The export checks the file against the program.

    Args:
        name: one of `random_models.SIZES`.
        layers: number of layers, fewer than the model has, to try it out.
        scheme, method, steps, samples, length, options: as for `memory`.
        dtype: type of the model's weights.
        say: called with what is being done.

    Raises:
        LoopQError: the model is unknown, or the process failed.
    """
    config = sized(name, layers)
    say(f"{name}, {config.num_hidden_layers} layers x {config.total_ut_steps} loops:")
    with tempfile.TemporaryDirectory() as folder:
        kept = dict(options or {})
        job = Job(config.to_dict(), scheme, method, steps, samples, length, kept, out=folder, dtype=dtype)
        model, *lines = measure(job, say)
        disk = sum(file.stat().st_size for file in Path(folder).iterdir())
    rows = [("the model itself", "", f"{model['peak'] / 2**30:.2f}", f"{model['peak'] / model['weights']:.1f}")]
    for line in lines:
        peak = line["peak"]
        rows.append((line["pass"], f"{line['seconds']:,.0f}", f"{peak / 2**30:.2f}", f"{peak / model['weights']:.1f}"))
    rows.append(("on disk", "", f"{disk / 2**30:.2f}", f"{disk / model['weights']:.1f}"))
    notes = [
        f"Peak resident memory while a pass runs, beyond the {dtype} model, which lies there before; and divided by "
        f"the {model['weights']:,} weights of its layers. {steps} steps, {samples} rows of {length} tokens, "
        f"{torch.get_num_threads()} threads. The weights are random."
    ]
    title = f"{name}, {config.num_hidden_layers} layers x {config.total_ut_steps} loops, {method} {scheme}"
    data = [model, *lines, {"pass": "on disk", "bytes": disk}]
    return Report("memory-of", title, ("pass", "seconds", "GiB", "bytes a weight"), rows, data, notes=notes)


def _config(width: int, layers: int, loops: int) -> OuroConfig:
    return replace(
        OuroConfig.ouro_1_4b(),
        vocab_size=512,
        hidden_size=width,
        intermediate_size=width * 11 // 4,  # as in Ouro
        num_attention_heads=width // _HEAD,
        num_key_value_heads=width // _HEAD,
        num_hidden_layers=layers,
        total_ut_steps=loops,
    )


def _row(line: Mapping[str, Any]) -> tuple[str, ...]:
    seconds = (f"{x:,.1f} / {y:,.1f}" for x, y in zip(line["predicted_seconds"], line["seconds"], strict=True))
    peaks = (
        f"{x / 2**20:,.0f} / {y / 2**20:,.0f}" for x, y in zip(line["predicted_peaks"], line["peaks"], strict=True)
    )
    return (line["pass"], *seconds, *peaks, f"{line['bytes']:.1f}")
