"""The methods, each a pipeline of passes.

`symmetric` rounds to nearest. `smoothquant`, `quarot`, `spinquant` and `flatquant` are the rivals; none of them uses
loops. `flatquant-e2e` is the control. `las` gives every loop its own ranges, `loopq-paper` is LoopQ as published, and
`loopq` is what was measured to be best. `loopq-plain` is the part of it that
engines without transforms can run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase

from loopq_compile.errors import LoopQError
from loopq_compile.graph.scheme import Scheme
from loopq_compile.graph.state import copy_graph, get_state
from loopq_compile.passes.learn.calibrate import Calibrate
from loopq_compile.passes.learn.calibrate_blocks import CalibrateBlocks
from loopq_compile.passes.learn.select_transforms import SelectTransforms
from loopq_compile.passes.loops.tag_loops import TagLoops
from loopq_compile.passes.quantize.annotate_linears import AnnotateLinears
from loopq_compile.passes.quantize.canonicalize_linears import CanonicalizeLinears
from loopq_compile.passes.quantize.collect_ranges import CollectRanges
from loopq_compile.passes.quantize.insert_activation_qdq import InsertActivationQdq
from loopq_compile.passes.quantize.latent_weights import LatentWeights
from loopq_compile.passes.quantize.pack_weights import PackWeights
from loopq_compile.passes.quantize.quantize_weights import QuantizeWeights
from loopq_compile.passes.quantize.round_scales import RoundScales
from loopq_compile.passes.quantize.set_ranges import SetRanges
from loopq_compile.passes.quantize.solve_weights import SolveWeights
from loopq_compile.passes.transforms.fold_diagonals import FoldDiagonals
from loopq_compile.passes.transforms.insert_adapters import InsertAdapters
from loopq_compile.passes.transforms.insert_compensation import InsertCompensation
from loopq_compile.passes.transforms.insert_las import InsertLas
from loopq_compile.passes.transforms.insert_transforms import InsertTransforms
from loopq_compile.passes.transforms.smooth_activations import SmoothActivations
from loopq_compile.pipeline import Pipeline
from loopq_compile.registry import Registry

LEARNED_STEPS = 400
"""Steps of the methods that learn end to end, if the options do not set them."""
SELECTION_ROUNDS = 2
SMOOTHING = 0.5
"""Exponent of the smoothing that learned diagonals start from."""
_FIRST_SHARE = 0.4
"""Share of the steps for transforms, before the solver; the rest is for rounding, after it."""
_FIRST_KINDS = ("transform", "diagonal", "weight_clip", "clip", "range", "adapter")
_SECOND_KINDS = ("rounding", "clip", "range", "adapter")
"""Transforms stay fixed after the solver, whose corrections fit the present directions of activations: learning
transforms at full rate undid the solver in one step (measured)."""
_FRONT: tuple[PassBase, ...] = (TagLoops(), CanonicalizeLinears(), AnnotateLinears())


def reference_graph(captured: fx.GraphModule, scheme: Scheme) -> fx.GraphModule:
    """The captured graph with loops tagged and linears listed, in full precision; node names are those of programs."""
    graph_module = copy_graph(captured)
    get_state(graph_module).scheme = scheme
    return Pipeline(_FRONT).run(graph_module)


def symmetric(*, transforms: bool = False) -> Pipeline:
    """Round to nearest; activation ranges are shared by all loops. Data-free with dynamic scales.

    Args:
        transforms: whether to insert the initial transforms of learned methods first; needs calibration data.
    """
    return Pipeline([*_FRONT, *(_transforms() if transforms else []), *_quantization(), *_back()], "symmetric")


def smoothquant() -> Pipeline:
    """`symmetric` after a factor per channel that moves outliers from activations into weights (Xiao et al. 2023).

    The factors come from maxima over all loops and tokens (alpha 0.5). Factors after norms become part of the gain; the
    others (before output and down projections) run in the program.
    """
    smoothed = symmetric().insert_after("annotate-linears", SmoothActivations())
    return Pipeline(smoothed.insert_after("smooth-activations", FoldDiagonals()), "smoothquant")


def quarot() -> Pipeline:
    """`symmetric` after fixed Hadamard rotations with random signs from the seed (QuaRot, Ashkboos et al. 2024).

    The paper rotates the residual stream once, folding gains and the rotation into neighbouring weights, and runs
    Hadamards before output and down projections. Here every group has its own rotation in the program, and gains move
    into the weights first. Norms without gain commute with rotations, so quantizers get the same input as in the paper:
    rotated normed states, rotated heads and MLP activations, and weights rotated on their input side. The
    output side of weights that write to the residual stream is not rotated, since groups lie along inputs.
    """
    rotated = symmetric().insert_after("annotate-linears", InsertTransforms("hadamard", diagonal="gain"))
    return Pipeline(rotated.insert_after("insert-transforms", FoldDiagonals()), "quarot")


def las() -> Pipeline:
    """Loop-aware activation scaling (LoopQ section 4.1): ranges, or clip ratios, for each loop from calibration."""
    return Pipeline(symmetric().insert_after("insert-activation-qdq", InsertLas()), "las")


def spinquant() -> Pipeline:
    """Learned rotations (SpinQuant, Liu et al. 2024), with GPTQ for the weights.

    One rotation for everything that reads the residual stream, one (a Kronecker product) for every other group; they
    start as Hadamards with random signs and move along the Stiefel manifold, to bring the predictions close to those of
    the full-precision model. Gains move into the weights first, as in `quarot`.
    """
    rotations = [
        InsertTransforms("full", diagonal="gain", init="hadamard", learn="orthogonal", stream=True, shared=True),
        InsertTransforms("kronecker", init="hadamard", learn="orthogonal", stream=False),
        FoldDiagonals(),
    ]
    learned = Calibrate(default_steps=100, kinds=("orthogonal",), trajectory=False)
    return Pipeline([*_FRONT, *rotations, *_quantization(), learned, SolveWeights("gptq"), PackWeights()], "spinquant")


def flatquant() -> Pipeline:
    """Learned Kronecker transforms, diagonals and clip ratios, trained layer by layer (FlatQuant, Sun et al. 2024)."""
    quantization = _quantization(learnable=True, rounding=False)
    return Pipeline([*_FRONT, *_transforms(), *quantization, CalibrateBlocks(), *_back()], "flatquant")


def flatquant_e2e() -> Pipeline:
    """The control: everything that `loopq` learns, from the same teacher on as many tokens, but without using loops.

    The same transforms, clip ratios, solver and rounding, one set for all loops; the loss uses only predictions. The
    difference between this and `loopq` is the gain from using loops.
    """
    first = Calibrate(_FIRST_SHARE, LEARNED_STEPS, kinds=_FIRST_KINDS, trajectory=False)
    second = Calibrate(1 - _FIRST_SHARE, LEARNED_STEPS, kinds=_SECOND_KINDS, trajectory=False)
    quantization = _quantization(learnable=True, rounding=True)
    passes = [*_FRONT, *_transforms(), *quantization, first, *_solve(), second, *_back()]
    return Pipeline(passes, "flatquant-e2e")


def loopq_paper() -> Pipeline:
    """LoopQ as published: LAS, SLT, CTA and trajectory-aware calibration; weights are rounded to nearest."""
    return _loopq("loopq-paper", rounding=False, final_share=1.0)


def loopq(
    *,
    las: bool = True,
    slt: bool = True,
    cta: bool = True,
    trajectory: bool = True,
    rounding: bool = True,
    transforms: bool = True,
    compensation_rank: int = 0,
) -> Pipeline:
    """LoopQ and what was measured to help beyond the paper (see `calibration/README.md`): learned rounding of weights,
    which starts from second-order solutions.

    Args:
        las: ranges or clip ratios per loop.
        slt: selected groups get transforms and weights per loop.
        cta: adapters between loops.
        trajectory: states at the ends of loops count in the loss, not only predictions.
        rounding: weights may move before they are rounded.
        transforms: transforms of activations and weights; without them `slt` has nothing to select.
        compensation_rank: rank of a low-rank part in floating point beside every quantized linear, with coefficients
            for each loop; 0 for none. Needs `rounding`, whose phase learns it.

    Raises:
        LoopQError: `compensation_rank` without `rounding`.
    """
    if compensation_rank and not rounding:
        raise LoopQError("compensation_rank needs rounding=True: it is learned in the phase after the solver.")
    slt = slt and transforms
    options = {"las": las, "slt": slt, "cta": cta, "trajectory": trajectory, "transforms": transforms}
    return _loopq("loopq", **options, rounding=rounding, compensation_rank=compensation_rank)


def loopq_plain() -> Pipeline:
    """`loopq` for engines that know neither transforms nor loops, such as llama.cpp: only the integers are better.

    GPTQ with sums over all loops, then learned rounding with the trajectory loss. Smoothing factors become part of a
    norm's gain, and are left out where that is not exact. There are no ranges per loop, transforms or adapters; dynamic
    activations keep their whole range, as such engines round them, and scales of weights are float16 numbers.
    """
    smoothing = [SmoothActivations(SMOOTHING, foldable=True), FoldDiagonals()]
    quantization = [CollectRanges(), QuantizeWeights(True, True), InsertActivationQdq(), SetRanges(clip=False)]
    learned = Calibrate(1.0, LEARNED_STEPS, ("rounding",), trajectory=True)
    passes = [*_FRONT, *smoothing, *quantization, *_solve(), learned, *_back(), RoundScales()]
    return Pipeline(passes, "loopq-plain")


def _loopq(
    name: str,
    *,
    las: bool = True,
    slt: bool = True,
    cta: bool = True,
    trajectory: bool = True,
    transforms: bool = True,
    rounding: bool,
    compensation_rank: int = 0,
    final_share: float | None = None,
) -> Pipeline:
    def calibrate(share: float, kinds: Iterable[str]) -> Calibrate:
        return Calibrate(share, LEARNED_STEPS, kinds, trajectory, final_share)

    passes: list[PassBase] = [*_FRONT, *(_transforms() if transforms else [])]
    passes += [CollectRanges(), QuantizeWeights(True, rounding)]
    passes += [InsertActivationQdq(), *([InsertLas()] if las else []), SetRanges()]
    passes += [InsertAdapters()] if cta else []
    share = _FIRST_SHARE if rounding else 1.0
    parts = SELECTION_ROUNDS + 1 if slt else 1
    for number in range(parts):
        passes.append(calibrate(share / parts, _FIRST_KINDS))
        passes += [SelectTransforms(number, SELECTION_ROUNDS)] if number < parts - 1 else []
    if rounding:
        compensation = [InsertCompensation(compensation_rank)] if compensation_rank else []
        passes += [*_solve(compensation), calibrate(1 - share, _SECOND_KINDS)]
    return Pipeline([*passes, *_back()], name)


def _transforms() -> list[PassBase]:
    """Smoothing, then Hadamards, both as a start for learning: together they help far more than each by itself
    (measured, see `calibration/README.md`)."""
    kronecker = InsertTransforms("kronecker", diagonal=True, init="hadamard", learn="transform")
    return [SmoothActivations(SMOOTHING, learn=True), kronecker]


def _quantization(learnable: bool = False, rounding: bool = False) -> list[PassBase]:
    return [CollectRanges(), QuantizeWeights(learnable, rounding), InsertActivationQdq(), SetRanges()]


def _solve(between: Iterable[PassBase] = ()) -> list[PassBase]:
    """The solver from whose result learned rounding starts; passes `between` see weights and integers."""
    return [SolveWeights("gptq", centered=False), *between, LatentWeights()]


def _back() -> list[PassBase]:
    """Ends a pipeline; weights that no solver has processed are rounded to nearest, or as the options say."""
    return [SolveWeights("rtn"), PackWeights()]


METHODS: dict[str, Callable[[], Pipeline]] = {
    "symmetric": symmetric,
    "smoothquant": smoothquant,
    "quarot": quarot,
    "spinquant": spinquant,
    "flatquant": flatquant,
    "flatquant-e2e": flatquant_e2e,
    "las": las,
    "loopq-paper": loopq_paper,
    "loopq": loopq,
    "loopq-plain": loopq_plain,
}
"""Pipelines by method name, including those added by `register_method`."""


def method_names() -> list[str]:
    """All methods: built-in, registered, and those of installed packages."""
    return _registry().names()


def register_method(name: str, make: Callable[[], Pipeline]) -> None:
    """Adds a method: `compile(method=name)` and the command line then know it in this process.

    Other packages add theirs permanently in `pyproject.toml`:

        [project.entry-points."loopq_compile.methods"]
        my-method = "my_package:my_pipeline"

    Args:
        name: not yet taken.
        make: makes a new pipeline. If it is built from one of this module, it also needs calibration data if that one
            does.

    Raises:
        LoopQError: the name is taken, or `make` cannot be called.
    """
    _registry().register(name, make)


def _registry() -> Registry:
    return Registry("method", "loopq_compile.methods", METHODS, _check_method)


def _check_method(name: str, make: object) -> None:
    if not callable(make):
        raise LoopQError(f"Method {name!r} must be a function that returns a Pipeline; got {make!r}.")


def get_pipeline(method: str | Pipeline) -> Pipeline:
    """The pipeline called `method`; a `Pipeline` is returned unchanged.

    Raises:
        LoopQError: the method is unknown.
    """
    if isinstance(method, Pipeline):
        return method
    if not isinstance(method, str):
        raise LoopQError(f"method must be a name or a loopq_compile.Pipeline; got {type(method).__name__}.")
    made = _registry().get(method)()
    if not isinstance(made, Pipeline):
        raise LoopQError(f"Method {method!r} must return a Pipeline; got {type(made).__name__}.")
    return made
