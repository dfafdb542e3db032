"""Runs the exporter on a model: as it is, and again where a cache of an earlier call hides how a value is computed."""

from __future__ import annotations

import contextlib
import inspect
import operator
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from loopq_compile.capture.errors import explain, quiet_exporter
from loopq_compile.capture.example_inputs import (
    Dimensions,
    dynamic_shapes,
    main_input,
    read_shapes,
    resize,
    separate,
    split_call,
)
from loopq_compile.capture.module_state import ModelState, hashable_sizes
from loopq_compile.capture.sizes import Watch, conditions_of, dimension_names, tied_sizes, watch_sizes
from loopq_compile.errors import CaptureError, LoopQError
from loopq_compile.graph.conditions import SizeCondition
from loopq_compile.graph.device import device_of

_LONGEST = 1 << 17
"""Longest example tried in order to make a model renew its caches."""


@dataclass
class Export:
    """What one run of the exporter found.

    Args:
        program: the exporter's result.
        values: the exporter's input tensors, by name.
        shapes: their shapes, with the names of dimensions.
        conditions: the conditions on sizes that the graph depends on.
        relations: how sizes follow from others, such as `labels_1 == sequence - 1`.
    """

    program: ExportedProgram
    values: dict[str, Tensor]
    shapes: dict[str, tuple[int | str, ...]]
    conditions: list[SizeCondition] = field(default_factory=list)
    relations: list[SizeCondition] = field(default_factory=list)


def export(model: nn.Module, arguments: Mapping[str, Any], named: Dimensions, state: ModelState) -> Export:
    """The graph of `model` with the fewest conditions on sizes.

    If a model is refused because it makes buffers on its first call, it is called once and then captured.

    Raises:
        CaptureError: `torch.export` cannot capture the model.
    """
    try:
        return _with_fewest_conditions(model, arguments, named, state)
    except CaptureError:
        if not state.made_tensors or not _call_once(model, arguments, state):
            raise
        try:
            return _with_fewest_conditions(model, arguments, named, ModelState(model))
        finally:
            state.restore()


def _call_once(model: nn.Module, arguments: Mapping[str, Any], state: ModelState) -> bool:
    """Runs `model` with real values, so that it has what its first call makes; False if it does not run.

    Raises:
        CaptureError: it makes weights or draws random values, which would not be those of the user's first call.
    """
    state.protect_values()
    args, _, kwargs = split_call(model, separate(arguments, device_of(model)))
    devices = sorted({value.device.index or 0 for value in kwargs.values() if getattr(value, "is_cuda", False)})
    weights = [name for name, _ in model.named_parameters()]
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            before = torch.get_rng_state()
            model(*args.values(), **kwargs)
            drawn = not torch.equal(torch.get_rng_state(), before)
    except Exception:  # models raise anything for an example that they do not accept
        state.restore()
        return False
    if drawn or [name for name, _ in model.named_parameters()] != weights:
        state.restore()
        raise CaptureError(
            f"{type(model).__name__} makes weights or draws random values on its first call. Run it once with "
            "the example inputs, and compile again."
        )
    return True


def _with_fewest_conditions(
    model: nn.Module, arguments: Mapping[str, Any], named: Dimensions, state: ModelState
) -> Export:
    """The best of several runs of the exporter.

    Caches of earlier calls (`if self.length != n`) make a model look as if it accepted one length only. If a first run
    is refused or finds conditions, and the model has such caches, the exporter therefore runs again from stale caches.
    """
    best: Export | None = None
    error: CaptureError | None = None

    def attempt() -> None:
        nonlocal best, error
        try:
            found = _run(model, arguments, named, state)
            if best is None or len(found.conditions) < len(best.conditions):
                best = found
        except CaptureError as refused:
            error = error or refused

    attempt()
    written = state.found
    for renew in (lambda: written, lambda: _provoke(model, arguments, named, state, best)):
        caches = renew() if best is None or best.conditions else []
        if caches:
            for place, key, stale in caches:
                place.write({**place.read(), key: stale})
            attempt()
    if best is None:
        assert error is not None
        raise error
    return best


def _provoke(
    model: nn.Module, arguments: Mapping[str, Any], named: Dimensions, state: ModelState, first: Export | None
) -> list[Any]:
    """Finds the caches that a model renews, by another run of the exporter at sizes that none of its caches has."""
    main = arguments[main_input(arguments)]
    kept = state.numbers()
    if first is None:
        wanted = {size for size in main.shape[:2] if size in kept}
    else:
        wanted = {number for condition in first.conditions for number in condition.numbers()} & kept
    longest = max((number + 1 for number in wanted if number < _LONGEST), default=0)
    if not longest:
        return []
    sizes = {"batch": main.shape[0] + 1, "sequence": max(longest, main.shape[1] + 1)}
    with contextlib.suppress(CaptureError):
        _run(model, resize(arguments, named, sizes), named, state)
    return state.found


def _run(model: nn.Module, arguments: Mapping[str, Any], named: Dimensions, state: ModelState) -> Export:
    """Runs the exporter once and restores the model; `state.found` then holds the caches that the run wrote."""
    watch = Watch()
    try:
        with _vmap_free_masks(), _without_disable_marks(model), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            # The exporter itself restores some of what a model assigns, so caches are looked for before that.
            model.register_forward_hook(lambda *_: state.find_caches(), always_call=True)
            try:
                program = _export(model, arguments, dynamic_shapes(arguments, named), watch)
            except CaptureError as error:
                if "unhashable type: non-nested SymInt" not in str(error):
                    raise
                with hashable_sizes():
                    program = _export(model, arguments, dynamic_shapes(arguments, named), watch)
    finally:
        state.restore()
    nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
    given = program.graph_signature.user_inputs
    tensors = [node.meta["val"] for node in nodes if node.name in given and isinstance(node.meta.get("val"), Tensor)]
    names = [name for name, value in arguments.items() if isinstance(value, Tensor)]
    values = dict(zip(names, tensors, strict=True))
    shapes = read_shapes(values, named, main_input(arguments))
    env = next((value.fake_mode.shape_env for value in values.values() if hasattr(value, "fake_mode")), None)
    symbols, relations = dimension_names(values, shapes)
    result = Export(program, values, shapes, relations=relations)
    if env is not None:
        result.relations += tied_sizes(env, symbols, shapes[main_input(arguments)])
        result.conditions = conditions_of(watch, env, symbols, captured_sizes(arguments, shapes))
    return result


def captured_sizes(arguments: Mapping[str, Any], shapes: Mapping[str, tuple[int | str, ...]]) -> dict[str, int]:
    """The example's sizes by name of dimension."""
    return {
        dim: size
        for name, shape in shapes.items()
        for dim, size in zip(shape, arguments[name].shape, strict=True)
        if isinstance(dim, str)
    }


def _export(model: nn.Module, arguments: Mapping[str, Any], shapes: dict[str, Any], watch: Watch) -> ExportedProgram:
    args, rest, kwargs = split_call(model, arguments)
    parameters = inspect.signature(model.forward).parameters
    dynamic = {name: shape for name, shape in shapes.items() if name in parameters}
    if rest is not None:
        dynamic[rest] = tuple(shapes[name] for name in args if name not in parameters)
    extra = {name: shapes[name] for name in kwargs if name not in parameters}
    if extra:
        dynamic[next(p.name for p in parameters.values() if p.kind is p.VAR_KEYWORD)] = extra
    try:
        with watch_sizes(watch), quiet_exporter():
            exported = torch.export.export(
                model, tuple(args.values()), kwargs, dynamic_shapes=dynamic or None, strict=False
            )
        _forget_unread_buffers(exported.graph)
        # Tracing a second time costs as much as the export itself; most models do not need it.
        return exported if _is_functional(exported.graph) else exported.run_decompositions({})
    except LoopQError:
        raise
    except Exception as error:
        raise CaptureError(explain(model, error, watch.fixed_at)) from error


def _forget_unread_buffers(graph: fx.Graph) -> None:
    """Removes writes to buffers that are overwritten as a whole and never read: tables that every call recomputes."""
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.copy_.default and not node.users:
            buffer = node.args[0]
            if buffer.op == "placeholder" and len(buffer.users) == 1:
                graph.erase_node(node)


def _is_functional(graph: fx.Graph) -> bool:
    """Whether a graph holds only operators without side effects: no in-place ones, no wrappers, no vmap."""
    plain = {operator.getitem}
    for node in graph.nodes:
        if node.op in ("placeholder", "output") or node.target in plain:
            continue
        schema = getattr(node.target, "_schema", None)
        symbolic = any(isinstance(node.meta.get("val"), kind) for kind in (torch.SymInt, torch.SymFloat, torch.SymBool))
        if (
            node.op != "call_function"
            or (schema is None and not symbolic)
            or (schema is not None and schema.is_mutable)
        ):
            return False
    return True


@contextlib.contextmanager
def _vmap_free_masks() -> Iterator[None]:
    """Makes transformers, if it is installed, build attention masks without vmap while exporting.

    transformers 4.x builds masks with `torch.vmap`, which leaves functorch bookkeeping in the graph. It ships functions
    without vmap for its own exporters.
    """
    masking = sys.modules.get("transformers.masking_utils")
    executorch: Any = None
    if masking is not None and hasattr(masking, "ALL_MASK_ATTENTION_FUNCTIONS"):
        with contextlib.suppress(ImportError):
            from transformers.integrations import executorch
    functions = getattr(masking, "ALL_MASK_ATTENTION_FUNCTIONS", None)
    plain = getattr(executorch, "sdpa_mask_without_vmap", None)
    if plain is None or functions is None:
        yield
        return
    replaced = {"sdpa": plain}
    if hasattr(executorch, "eager_mask_without_vmap"):
        replaced["eager"] = executorch.eager_mask_without_vmap
    before = {name: functions[name] for name in replaced}
    try:
        for name, function in replaced.items():
            functions[name] = function
        yield
    finally:
        for name, function in before.items():
            functions[name] = function


@contextlib.contextmanager
def _without_disable_marks(model: nn.Module) -> Iterator[None]:
    """Removes `torch._dynamo.disable(recursive=False)` from the methods of `model` while exporting.

    Methods with this mark refuse to run under the exporter, even in non-strict mode, where the mark has no meaning:
    that mode runs them in plain Python without Dynamo.
    """
    marked = [
        (cls, name, method)
        for cls in {cls for module in model.modules() for cls in type(module).__mro__}
        for name, method in vars(cls).items()
        if getattr(getattr(method, "__code__", None), "co_name", "") == "nonrecursive_disable_wrapper"
    ]
    try:
        for cls, name, method in marked:
            setattr(cls, name, method.__wrapped__)
        yield
    finally:
        for cls, name, method in marked:
            setattr(cls, name, method)
