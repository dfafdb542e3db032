"""Capture: an `nn.Module` becomes one flat ATen graph, by `torch.export` in non-strict mode.

The exporter's output is brought into the form that passes expect: functional (no in-place operators), no wrappers
around `set_grad_enabled` or `vmap`, weights as `get_attr` nodes, one node per tensor no matter how many names it has.
"""

from __future__ import annotations

import keyword
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from loopq_compile.capture.compare import Comparison
from loopq_compile.capture.example_inputs import Dimensions, bind_example, name_dimensions, separate, widen
from loopq_compile.capture.exporter import captured_sizes, export
from loopq_compile.capture.model_checks import check_model, check_stored_weights, check_weights
from loopq_compile.capture.module_state import ModelState
from loopq_compile.capture.origin import first_names, identity, read_origin
from loopq_compile.capture.sizes import necessary
from loopq_compile.capture.surroundings import undisturbed, with_plain_tensors
from loopq_compile.errors import CaptureError, LoopQError
from loopq_compile.graph.device import device_of
from loopq_compile.graph.fold_weights import fold_weights, returns_its_input
from loopq_compile.graph.names import safe_argument, safe_name
from loopq_compile.graph.signature import InputSpec, Signature
from loopq_compile.graph.state import CompilerState, attach_state


def capture(model: nn.Module, example_inputs: Any = None) -> fx.GraphModule:
    """The graph of `model(*example_inputs)` with dynamic batch and sequence, its state attached.

    Args:
        model: the module; it is captured in evaluation mode and left unchanged.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments. Tensors become inputs, other
            values (flags, None) become part of the graph. The first integer tensor of at least two dimensions is
            taken as `[batch, sequence]`; dimensions of other tensors that match become dynamic with it. Hugging Face
            causal language models need none.

    Returns:
        A `GraphModule` whose placeholders are the tensor inputs; see `loopq_compile.graph.state`.

    Raises:
        LoopQError: the model or the example inputs are unusable.
        CaptureError: `torch.export` cannot capture the model; the message shows the source line.
    """
    check_model(model)
    with undisturbed(device_of(model)), with_plain_tensors(model):
        return _capture_model(model, example_inputs)


def _capture_model(model: nn.Module, example_inputs: Any) -> fx.GraphModule:
    check_weights(model)
    names, arguments = bind_example(model, example_inputs)
    _check_input_names(arguments)
    named = name_dimensions(arguments)
    arguments = separate(widen(arguments, named), device_of(model))
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        state = ModelState(model)
        try:
            graph_module, signature = _capture(model, names, arguments, named, state)
        finally:
            state.restore()
    finally:
        for module, mode in training.items():
            module.training = mode
    fold_weights(graph_module)
    attach_state(graph_module, CompilerState(signature, type(model).__name__, read_origin(model)))
    return graph_module


def _check_input_names(arguments: Mapping[str, Any]) -> None:
    for name in arguments:
        if not name.isidentifier() or keyword.iskeyword(name):
            raise LoopQError(
                f"Input {name!r} has a name that Python does not take for an argument, and torch.export needs one: "
                "rename it."
            )


def _capture(
    model: nn.Module, names: list[str], arguments: dict[str, Any], named: Dimensions, state: ModelState
) -> tuple[fx.GraphModule, Signature]:
    names_of = first_names(model)
    found = export(model, arguments, named, state)
    graph_module = _lower_to_graph_module(found.program, arguments, names_of)
    inputs = tuple(InputSpec(name, value.dtype, found.shapes[name]) for name, value in found.values.items())
    constants = {name: value for name, value in arguments.items() if not isinstance(value, Tensor)}
    signature = Signature(tuple(names), inputs, constants, found.program.call_spec.out_spec)
    sizes = captured_sizes(arguments, found.shapes)
    conditions = tuple(found.relations)
    if found.conditions:
        named = {
            name: {i: dim for i, dim in named[name].items() if isinstance(shape[i], str)}
            for name, shape in found.shapes.items()
        }
        compare = Comparison(model, graph_module, signature, arguments, named, state)
        conditions += necessary(found.conditions, sizes, compare)
    if conditions or set(sizes) - {"batch", "sequence"}:
        signature = replace(signature, conditions=conditions, captured=sizes)
    return graph_module, signature


def _lower_to_graph_module(
    exported: ExportedProgram, arguments: Mapping[str, Any], names_of: Mapping[tuple[Any, ...], str]
) -> fx.GraphModule:
    """Moves lifted weights back into `get_attr` nodes, one per tensor, and renames nodes in order."""
    signature = exported.graph_signature
    for spec in signature.output_specs:
        if spec.kind is not OutputKind.USER_OUTPUT:
            kind = spec.kind.name.split("_")[0].lower()
            if spec.kind is OutputKind.PARAMETER_MUTATION:
                raise CaptureError(
                    f"The model rewrites its weight {spec.target!r} while it runs, as nn.Embedding(max_norm=...) does; "
                    "a program has fixed weights. Apply the norm to the weight once, and set max_norm = None."
                )
            raise CaptureError(
                f"The model writes to its {kind} {spec.target!r} while it runs; a program has no state. "
                "Return the value instead of storing it, or switch off the cache (use_cache=False)."
            )
    lifted = {spec.arg.name: spec for spec in signature.input_specs if spec.kind is not InputKind.USER_INPUT}
    tensors = {**exported.state_dict, **exported.constants}
    names = iter([name for name, value in arguments.items() if isinstance(value, Tensor)])
    attributes: dict[str, Tensor] = {}
    shared: dict[Any, fx.Node] = {}
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in exported.graph.nodes:
        if node.op == "placeholder" and node.name in lifted:
            if node.users:
                target = lifted[node.name].target
                copied[node] = _weight_node(
                    graph,
                    safe_name(names_of.get(identity(tensors[target]), target)),
                    tensors[target],
                    attributes,
                    shared,
                )
                copied[node].meta["val"] = node.meta.get("val")
        elif node.op == "placeholder":
            value = node.meta.get("val")
            if isinstance(value, Tensor):
                copied[node] = graph.placeholder(safe_argument(next(names)))
                copied[node].meta.update(node.meta)
        elif node.op == "output":
            graph.output(tuple(copied.get(value, value) for value in node.args[0]))
        else:
            if not isinstance(node.target, torch._ops.OpOverload) and node.op == "call_function":
                _check_plain_function(node)
            if _is_assertion(node):
                continue
            if _is_identity(node):
                copied[node] = copied[node.args[0]]
                continue
            args, kwargs = fx.map_arg((node.args, node.kwargs), copied.__getitem__)
            hint = getattr(getattr(node.target, "overloadpacket", node.target), "__name__", None)
            copied[node] = graph.create_node(node.op, node.target, args, kwargs, name=hint)
            copied[node].meta.update(node.meta)
    graph_module = fx.GraphModule(attributes, graph)
    graph_module.graph.eliminate_dead_code()
    check_stored_weights(graph_module.graph)
    graph_module.recompile()
    return graph_module


def _is_assertion(node: fx.Node) -> bool:
    """The exporter's run-time checks; `Signature.bind` checks inputs instead."""
    return not node.users and any(part in str(node.target) for part in ("assert", "sym_constrain_range"))


def _is_identity(node: fx.Node) -> bool:
    """Operators that return their input: whole slices, detach, dropout outside training, casts of no effect."""
    aten = torch.ops.aten
    if node.target is aten.slice.Tensor:
        given: list[Any] = list(node.args[1:])
        start, end, step = (given + [0, None, None, 1][len(given) :])[1:]
        return start in (None, 0) and isinstance(end, int) and end == torch.iinfo(torch.int64).max and step == 1
    if node.target is aten.dropout.default:
        return not node.args[2]
    return node.target in (aten.detach.default, aten.alias.default) or returns_its_input(node)


def _weight_node(
    graph: fx.Graph, target: str, tensor: Tensor, attributes: dict[str, Tensor], shared: dict[Any, fx.Node]
) -> fx.Node:
    found = identity(tensor)
    if found not in shared:
        frozen = nn.Parameter(tensor.detach(), requires_grad=False) if isinstance(tensor, nn.Parameter) else tensor
        attributes[target] = frozen
        shared[found] = graph.get_attr(target)
    return shared[found]


def _check_plain_function(node: fx.Node) -> None:
    module = getattr(node.target, "__module__", "") or ""
    if "functorch" in module or "vmap" in str(node.target):
        line = (node.meta.get("stack_trace") or "").strip().splitlines()[-2:]
        raise CaptureError(
            f"torch.vmap is left in the graph at {' '.join(part.strip() for part in line)}; write the computation with "
            "broadcasting instead."
        )
