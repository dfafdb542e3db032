"""Peak memory of a calibration by pass, and how much of it every quantized weight takes: a slope over layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from loopq_compile.bench.memory_session import Job, measure
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
    for count in sorted(set(layers)):
        say(f"{count} layers x {loops} loops, width {width}")
        config = _config(width, count, loops).to_dict()
        job = Job(config, scheme, method, steps, samples, length, dict(options or {}), processes=processes)
        runs.append(measure(job, say))
    weights = [run[0]["weights"] for run in runs]
    data = []
    for lines in zip(*(run[1:] for run in runs), strict=True):
        slope = (lines[-1]["peak"] - lines[0]["peak"]) / (weights[-1] - weights[0])
        seconds, peaks = ([line[key] for line in lines] for key in ("seconds", "peak"))
        data.append({"pass": lines[0]["pass"], "seconds": seconds, "peaks": peaks, "bytes": slope})
    counts = sorted(set(layers))
    columns = (
        "pass",
        *(f"{count} layers, s" for count in counts),
        *(f"{count} layers, MiB" for count in counts),
        "bytes a weight",
    )
    notes = [
        f"Peak resident memory while a pass runs, without the float32 model (4 bytes a weight) that lies there before. "
        f"{steps} steps, {samples} rows of {length} tokens. Bytes a weight: the difference between the deepest and the "
        "shallowest model, for each weight of its layers."
    ]
    title = f"{method} {scheme}, width {width}, {loops} loops"
    if processes > 1:
        title += f", {processes} processes"
        notes.append("Peaks are those of the largest process.")
    return Report("memory", title, columns, [_row(line) for line in data], data, notes=notes)


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
    seconds = (f"{value:.1f}" for value in line["seconds"])
    peaks = (f"{value / 2**20:,.0f}" for value in line["peaks"])
    return (line["pass"], *seconds, *peaks, f"{line['bytes']:.1f}")
