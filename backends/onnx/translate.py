"""Third step of an export: ATen operators become ONNX operators, by `torch.onnx`.

torch.onnx takes an `ExportedProgram`. One is made here from the flat graph, without tracing it again, which took half
of the time of an export.
"""

from __future__ import annotations

import ast
import contextlib
import logging
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace

import onnx_ir as ir
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram, graph_signature

from loopq_compile.backends.onnx.flatten import EXTENT, Flattener
from loopq_compile.backends.onnx.prepare import Origin, Prepared
from loopq_compile.errors import LoopQError
from loopq_compile.graph.rolled import rolled_loops
from loopq_compile.graph.shapes import symbolic_inputs
from loopq_compile.graph.signature import LOOPS_AXIS, InputSpec, Signature

WEIGHT_PREFIX = "program."
"""Prefix of tensor names, which might otherwise be those of inputs or results."""

_NAME_SCOPES = "pkg.torch.onnx.name_scopes"
"""Where torch.onnx writes the names of modules around a node, and last that of the node."""


def translate(prepared: Prepared, signature: Signature, output_names: list[str], opset: int) -> ir.Model:
    """The ONNX model of a prepared graph, with quantization and linear layers left as nodes of the domain `loopq`.

    Metadata of a node: `loopq.loop` (`"2"`), `loopq.site` and `loopq.node` (its name in the printed program), where
    known.

    Raises:
        LoopQError: an operator has no ONNX translation; the message names it, its loop and its source line.
    """
    inputs = list(signature.inputs)
    if rolled_loops(prepared.graph_module):
        inputs.append(InputSpec(EXTENT, torch.float32, (LOOPS_AXIS,)))
    signature = replace(signature, inputs=tuple(inputs))
    expanded: list[str] = []
    try:
        with _quiet(), torch.no_grad():
            while True:
                writer = Flattener(prepared, expanded)
                try:
                    model = _to_onnx(_exported(writer, signature), signature, output_names, opset)
                    break
                except torch.onnx.errors.OnnxExporterError as error:
                    missing = [operator for operator in _missing(error) if operator not in expanded]
                    if not missing:
                        raise
                    expanded += missing
    except Exception as error:
        raise LoopQError(_explain(error, prepared, expanded)) from error
    for node in model.graph.all_nodes():
        _name(node, writer.origins)
    return model


def _exported(writer: Flattener, signature: Signature) -> ExportedProgram:
    """The flat graph as an `ExportedProgram`, whose tensors are inputs."""
    given = [spec.name for spec in signature.inputs]
    values = symbolic_inputs(signature, None)
    graph = writer.write(list(zip(given, values, strict=True)))
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    stored: dict[str, fx.Node] = {}
    tensors: dict[str, Tensor] = {}
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        name = f"{WEIGHT_PREFIX}{node.target}"
        tensors[name] = writer.tensors[node]
        with graph.inserting_before(inputs[0]):
            stored[name] = graph.placeholder(node.name)
        stored[name].meta.update(node.meta)
        node.replace_all_uses_with(stored[name])
        graph.erase_node(node)
    kinds = graph_signature.InputKind.BUFFER, graph_signature.InputKind.USER_INPUT
    argument = graph_signature.TensorArgument
    specs = [
        *(graph_signature.InputSpec(kinds[0], argument(node.name), name, True) for name, node in stored.items()),
        *(graph_signature.InputSpec(kinds[1], argument(node.name), None) for node in inputs),
    ]
    results = next(node for node in graph.nodes if node.op == "output").args[0]
    kind = graph_signature.OutputKind.USER_OUTPUT
    outputs = [graph_signature.OutputSpec(kind, argument(node.name), None) for node in results]
    about = graph_signature.ExportGraphSignature(specs, outputs)
    return ExportedProgram(torch.nn.Module(), graph, about, tensors, {}, [])


def _to_onnx(exported: ExportedProgram, signature: Signature, output_names: list[str], opset: int) -> ir.Model:
    # torch.onnx decomposes operators and promotes types by tracing the graph three more times, which takes most of its
    # time. Both is already done.
    exported.run_decompositions = lambda *_: exported  # type: ignore[method-assign]
    exported.graph_module.modules = lambda *_: ()  # type: ignore[method-assign]
    program = torch.onnx.export(
        exported,
        dynamo=True,
        opset_version=opset,
        optimize=False,
        verbose=False,
        input_names=[spec.name for spec in signature.inputs],
        output_names=output_names,
        dynamic_shapes=(tuple(_dynamic_axes(spec) for spec in signature.inputs),),
    )
    assert program is not None
    return program.model


def _dynamic_axes(spec: InputSpec) -> dict[int, str]:
    return {i: size for i, size in enumerate(spec.shape) if isinstance(size, str)}


def _name(node: ir.Node, origins: dict[str, Origin]) -> None:
    """Replaces what torch.onnx wrote, including stack traces with local paths, by where the node comes from."""
    origin = origins.get(ast.literal_eval(node.metadata_props.get(_NAME_SCOPES, "['']"))[-1])
    node.metadata_props.clear()
    if origin is not None:
        values = {"loopq.loop": origin.loop, "loopq.site": origin.site, "loopq.node": origin.node}
        node.metadata_props.update({key: value for key, value in values.items() if value})


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides warnings of torch.onnx about missing optional packages and about things that a user cannot change."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _chain(error: BaseException) -> list[BaseException]:
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    return chain


def _missing(error: BaseException) -> list[str]:
    """Operators that torch.onnx does not know, such as `aten.foo.default`."""
    text = "\n".join(map(str, _chain(error)))
    found = re.findall(r"No ONNX function found for <OpOverload\(op='([\w.]+)', overload='(\w+)'\)>", text)
    return list(dict.fromkeys(f"{operator}.{overload}" for operator, overload in found))


def _explain(error: Exception, prepared: Prepared, expanded: list[str]) -> str:
    last = _chain(error)[-1]
    first = next((line.strip() for line in str(last).splitlines() if line.strip()), type(last).__name__)
    bodies = [loop.body for loop in rolled_loops(prepared.graph_module)]
    nodes = [node for part in (prepared.graph_module, *bodies) for node in part.graph.nodes]
    # What is missing may be a part of an operator that was decomposed before.
    for operator in [*_missing(error), *reversed(expanded)]:
        node = next((node for node in nodes if str(node.target) == operator), None)
        if node is not None:
            origin = prepared.origins[node.name]
            where = f"node {origin.node}{f' in loop {origin.loop}' if origin.loop else ''}"
            line = (node.meta.get("stack_trace") or "").strip().splitlines()[-2:]
            return (
                f"Operator {node.target} ({where}) has no ONNX translation. Write that part of the model with other "
                f"operators: {' '.join(part.strip() for part in line) or 'source line unknown'}"
            )
    return f"The program cannot be translated to ONNX: {first[:600]}"
