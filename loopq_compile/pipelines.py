"""The methods, each a pipeline of passes.

`symmetric` rounds to nearest with ranges shared by all loops. `las` gives every loop its own ranges. `loopq` is
everything of the LoopQ method that this version has.
"""

from __future__ import annotations

from collections.abc import Callable

from loopq_compile.errors import LoopQError, did_you_mean
from loopq_compile.passes.annotate_linears import AnnotateLinears
from loopq_compile.passes.canonicalize_linears import CanonicalizeLinears
from loopq_compile.passes.collect_ranges import CollectRanges
from loopq_compile.passes.insert_activation_qdq import InsertActivationQdq
from loopq_compile.passes.insert_las import InsertLas
from loopq_compile.passes.pack_weights import PackWeights
from loopq_compile.passes.quantize_weights import QuantizeWeights
from loopq_compile.passes.set_ranges import SetRanges
from loopq_compile.passes.tag_loops import TagLoops
from loopq_compile.pipeline import Pipeline

PLANNED = ("smoothquant", "quarot", "spinquant", "flatquant", "flatquant-e2e", "loopq-paper")
"""Methods of the public contract that this version does not have."""


def symmetric() -> Pipeline:
    """Round to nearest; activation ranges are shared by all loops. Data-free with dynamic scales."""
    return Pipeline(
        [
            TagLoops(),
            CanonicalizeLinears(),
            AnnotateLinears(),
            CollectRanges(),
            QuantizeWeights(),
            InsertActivationQdq(),
            SetRanges(),
            PackWeights(),
        ],
        "symmetric",
    )


def las() -> Pipeline:
    """Loop-aware activation scaling (LoopQ section 4.1): ranges, or clip ratios, of every loop from calibration."""
    return Pipeline(symmetric().insert_after("insert-activation-qdq", InsertLas()), "las")


def loopq() -> Pipeline:
    """LoopQ as far as this version goes: loop-aware activation scaling, without loop-aware transformations (SLT), the
    transition adapter (CTA) and trajectory-aware calibration."""
    return Pipeline(las(), "loopq")


METHODS: dict[str, Callable[[], Pipeline]] = {"symmetric": symmetric, "las": las, "loopq": loopq}
"""Pipelines by method name."""


def get_pipeline(method: str | Pipeline) -> Pipeline:
    """The pipeline called `method`; a `Pipeline` is returned as it is.

    Raises:
        LoopQError: the method is unknown or not in this version.
    """
    if isinstance(method, Pipeline):
        return method
    if not isinstance(method, str):
        raise LoopQError(f"method must be a name or a loopq_compile.Pipeline; got {type(method).__name__}.")
    if method in PLANNED:
        raise LoopQError(f"Method {method!r} is planned and not in this version. Known: {', '.join(sorted(METHODS))}.")
    if method not in METHODS:
        raise LoopQError(f"Unknown method {method!r}.{did_you_mean(method, METHODS)}")
    return METHODS[method]()
