"""What a study measures: runs, their common settings, and the selection of runs for a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loopq_compile.evaluation.perplexity import LENGTH, STRIDE
from loopq_compile.graph.scheme import Scheme


@dataclass(frozen=True)
class Run:
    """One setting.

    Args:
        method: name of a pipeline.
        scheme: bits, groups, kind of activation scales.
        seed: seed of the calibration samples, and of everything random in the method.
        samples: calibration rows; None for the study's own number.
        flags: arguments of the pipeline's function, such as `{"cta": False}`.
        options: fields of `CalibrationOptions` in addition to the study's own.
        label: name in tables; by default the method.
    """

    method: str
    scheme: Scheme
    seed: int = 0
    samples: int | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""

    @property
    def name(self) -> str:
        """Name of the run in tables."""
        return self.label or self.method

    @property
    def setting(self) -> str:
        """Method and scheme, such as `loopq w4a4 static`."""
        activation = self.scheme.activation if self.scheme.quantizes_activations else ""
        return " ".join(filter(None, (self.name, self.scheme.name, activation)))

    def __str__(self) -> str:
        samples = f"{self.samples} samples" if self.samples else ""
        others = " ".join(
            f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}"
            for name, value in self.options.items()
        )
        return " ".join(filter(None, (self.setting, samples, others, f"seed {self.seed}")))


@dataclass(frozen=True)
class Settings:
    """What all cells of a study have in common.

    Args:
        model: name of the model, for people.
        text: source of the held-out text, for people.
        calibration: `self`, `docs`, `mixed`, or a text file.
        samples, sample_length: calibration rows, and tokens in each.
        length, stride: of the perplexity's sliding window.
        options: fields of `CalibrationOptions` for every run.
        cache: folder for calibration text that the model samples.
    """

    model: str = ""
    text: str = ""
    calibration: str = "docs"
    samples: int = 32
    sample_length: int = 128
    length: int = LENGTH
    stride: int = STRIDE
    options: Mapping[str, Any] = field(default_factory=dict)
    cache: str | Path | None = None


@dataclass(frozen=True)
class Selection:
    """The runs of a report.

    Args:
        methods: names of pipelines.
        schemes: bits and kind of activation scales.
        seeds: each run is repeated with each.
        values: the points of a sweep (numbers of groups, loops, or samples); empty for the report's own.
    """

    methods: Sequence[str]
    schemes: Sequence[Scheme]
    seeds: Sequence[int] = (0,)
    values: Sequence[int] = ()

    def runs(self, **options: Any) -> list[list[Run]]:
        """Methods by schemes, schemes outermost; each entry has one run per seed."""
        return [
            [Run(method, scheme, seed, **options) for seed in self.seeds]
            for scheme in self.schemes
            for method in self.methods
        ]
