"""Second step of an export: ATen operators become ONNX operators, by `torch.onnx`.

Quantization and linear layers pass through it as opaque nodes of the domain `loopq`. Constant folding can then neither
turn a dequantized weight back into floating point nor store a second, transposed copy of a tied weight. The target
decides later what the nodes become.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import onnx_ir as ir
import torch
import torch.fx.traceback as fx_traceback
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

import loopq_compile.operators  # noqa: F401  (registers torch.ops.loopq)
from loopq_compile.backends.onnx.decompose import DECOMPOSITIONS
from loopq_compile.backends.onnx.prepare import Prepared
from loopq_compile.errors import LoopQError
from loopq_compile.graph.rolled import goes_on, rolled_loops
from loopq_compile.graph.signature import LOOPS_AXIS, PAST, TOTAL, InputSpec, Signature

DOMAIN = "loopq"
"""Domain of the opaque nodes `Quantize`, `Dequantize`, `DynamicScale` and `Linear`."""

EXTENT = "loops_extent"
"""Input that represents the loop count while a rolled graph is translated: a vector with that many entries."""

_EXAMPLE_LOOPS = 13
_EXAMPLE_SIZES = {"batch": 2, "sequence": 16, PAST: 11, TOTAL: 27, LOOPS_AXIS: _EXAMPLE_LOOPS}
_aten, _loopq = torch.ops.aten, torch.ops.loopq


def translate(prepared: Prepared, signature: Signature, output_names: list[str], opset: int) -> ir.Model:
    """The ONNX model of a prepared graph, with quantization and linear layers left as nodes of `DOMAIN`.

    `origin_of` finds the FX node that an ONNX node came from.

    Raises:
        LoopQError: an operator has no ONNX translation; the message names it, its loop and its source line.
    """
    for node in _all_nodes(prepared):
        # torch.onnx writes the module stack into the file's metadata and keeps it through its own rewrites, so it can
        # carry the node's name.
        node.meta["nn_module_stack"] = {"loopq": (f"loopq:{node.name}", "torch.nn.Module")}
    try:
        with _quiet(), torch.no_grad():
            exported = _retrace(prepared, signature)
            try:
                return _to_onnx(exported, signature, output_names, opset, decompose=False)
            except torch.onnx.errors.OnnxExporterError:  # an operator that torch.onnx supports only in part
                return _to_onnx(exported, signature, output_names, opset, decompose=True)
    except Exception as error:
        raise LoopQError(_explain(error, prepared)) from error


def _all_nodes(prepared: Prepared) -> list[fx.Node]:
    """The nodes of the graph, and those of the bodies of rolled loops."""
    bodies = [loop.body for loop in rolled_loops(prepared.graph_module)]
    return [node for part in (prepared.graph_module, *bodies) for node in part.graph.nodes]


def _retrace(prepared: Prepared, signature: Signature) -> ExportedProgram:
    """The graph as an `ExportedProgram`, which is what torch.onnx takes."""
    placeholders = [node for node in prepared.graph_module.graph.nodes if node.op == "placeholder"]
    inputs = tuple(_example(spec, node) for spec, node in zip(signature.inputs, placeholders, strict=True))
    dynamic = tuple({i: Dim.DYNAMIC for i in _dynamic_axes(spec)} for spec in signature.inputs)
    if rolled_loops(prepared.graph_module):
        inputs, dynamic = (*inputs, torch.zeros(_EXAMPLE_LOOPS)), (*dynamic, {0: Dim.DYNAMIC})
    return torch.export.export(_Runner(prepared.graph_module), inputs, dynamic_shapes=(dynamic,), strict=False)


def _to_onnx(
    exported: ExportedProgram, signature: Signature, output_names: list[str], opset: int, *, decompose: bool
) -> ir.Model:
    if not decompose:
        # torch.onnx decomposes operators by tracing the graph twice more, which takes two thirds of its time. The
        # few that language models need are already decomposed.
        exported = copy.copy(exported)
        exported.run_decompositions = lambda *_: exported  # type: ignore[method-assign]
    rolled = len(exported.graph_signature.user_inputs) > len(signature.inputs)
    program = torch.onnx.export(
        exported,
        dynamo=True,
        opset_version=opset,
        optimize=False,
        verbose=False,
        input_names=[*(spec.name for spec in signature.inputs), *([EXTENT] if rolled else [])],
        output_names=output_names,
        dynamic_shapes=((*(_dynamic_axes(spec) for spec in signature.inputs), *([{0: "loops"}] if rolled else [])),),
    )
    assert program is not None
    return program.model


def _dynamic_axes(spec: InputSpec) -> dict[int, str]:
    return {i: size for i, size in enumerate(spec.shape) if isinstance(size, str)}


def origin_of(node: ir.Node) -> str | None:
    """Name of the FX node that `node` came from; None for nodes that the optimizer created."""
    match = re.search(r"loopq:([^']+)'", node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
    return match[1] if match else None


class _Interpreter(fx.Interpreter):
    def __init__(self, graph_module: fx.GraphModule, extent: Tensor) -> None:
        super().__init__(graph_module)
        self.extent = extent

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is _loopq.quantize.default:
            x, scale, group_size, q_min, q_max = args
            attributes = {"group_size": group_size, "q_min": q_min, "q_max": q_max}
            return _opaque("Quantize", (x, scale), attributes, torch.int8, x.shape)
        if target is _loopq.dequantize.default:
            codes, scale, group_size = args
            return _opaque("Dequantize", (codes, scale), {"group_size": group_size}, scale.dtype, codes.shape)
        if target is _loopq.dynamic_scale.default:
            x, clip, group_size, limit = args
            shape = (*x.shape[:-1], x.shape[-1] // group_size)
            return _opaque("DynamicScale", (x, clip), {"group_size": group_size, "limit": limit}, x.dtype, shape)
        if target is _aten.linear.default and args[1].ndim == 2 and args[0].ndim >= 2:
            shape = (*args[0].shape[:-1], args[1].shape[0])
            return _opaque("Linear", (*args, *kwargs.values()), {}, args[0].dtype, shape)
        if target is _aten.select.int and isinstance(args[2], Tensor):
            return _opaque("Row", (args[0], args[2]), {}, args[0].dtype, args[0].shape[1:])
        return super().call_function(DECOMPOSITIONS.get(target, target), args, kwargs)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Writes the body of a rolled loop once, between two marks; `backends.onnx.loop` cuts it out again."""
        loop = self.fetch_attr(target)
        state, shared, *threshold = args
        about = {"number": loop.number, "count": loop.count, "rows": loop.rows, "skipped": loop.skipped}
        dtypes, shapes = [x.dtype for x in state], [x.shape for x in state]
        integers = [torch.int64, torch.int64]
        row, iteration, *current = _opaques("LoopBegin", state, about, [*integers, *dtypes], [(), (), *shapes])
        given = [
            _opaque("Row", (x, iteration), {}, x.dtype, x.shape[1:]) if i in loop.scanned else x
            for i, x in enumerate(shared)
        ]
        results = _Interpreter(loop.body, self.extent).run(row, *current, *given)
        collected = results[len(current) :]
        count = self.extent.shape[0] if loop.number == 0 else loop.count
        if loop.number == 0 and loop.skipped:
            count = count - loop.skipped
        dtypes += [x.dtype for x in collected]
        shapes += [(count, *x.shape) for x in collected]
        early = loop.survival is not None
        proceed = [goes_on(results[loop.survival], *threshold)] if early else []
        return _opaques("LoopEnd", [*results, *proceed], {"number": loop.number, "early": early}, dtypes, shapes)


def _opaques(
    name: str, inputs: Sequence[Tensor], attributes: dict[str, Any], dtypes: Sequence[torch.dtype], shapes: Any
) -> Sequence[Tensor]:
    return torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{name}", inputs, attributes, dtypes=dtypes, shapes=shapes, version=1
    )


def _opaque(
    name: str, inputs: tuple[Tensor, ...], attributes: dict[str, Any], dtype: torch.dtype, shape: Any
) -> Tensor:
    return torch.onnx.ops.symbolic(f"{DOMAIN}::{name}", inputs, attributes, dtype=dtype, shape=shape, version=1)


class _Runner(nn.Module):
    """Runs the graph node by node, so that `torch.export` sees the metadata of each."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__()
        self.program = graph_module

    def forward(self, *inputs: Tensor) -> Any:
        with fx_traceback.preserve_node_meta():
            count = sum(node.op == "placeholder" for node in self.program.graph.nodes)
            return _Interpreter(self.program, inputs[-1]).run(*inputs[:count])


WEIGHT_PREFIX = "program."
"""Prefix that `torch.onnx` puts before tensor names, because the graph is a submodule of `_Runner`."""


def _example(spec: InputSpec, node: fx.Node) -> Tensor:
    """A tensor of the size seen at capture, since the graph may require more of a size than its name says."""
    value = node.meta.get("val")
    shape = []
    for i, size in enumerate(spec.shape):
        if isinstance(size, str):
            captured = getattr(getattr(value.shape[i], "node", None), "hint", None) if value is not None else None
            size = captured or _EXAMPLE_SIZES.get(size, 16)
        shape.append(size)
    return torch.zeros(shape, dtype=spec.dtype)


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


def _explain(error: Exception, prepared: Prepared) -> str:
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    text = "\n".join(str(part) for part in chain)
    # The second attempt's message comes first. It may miss the parts of a decomposed operator, which the first names.
    found = re.findall(r"No ONNX function found for <OpOverload\(op='([\w.]+)', overload='(\w+)'\)>", text)
    missing = dict.fromkeys(f"{operator}.{overload}" for operator, overload in found)
    first = next((line.strip() for line in str(chain[-1]).splitlines() if line.strip()), type(chain[-1]).__name__)
    for operator in missing:
        node = next((node for node in _all_nodes(prepared) if str(node.target) == operator), None)
        if node is not None:
            origin = prepared.origins[node.name]
            where = f"node {origin.node}{f' in loop {origin.loop}' if origin.loop else ''}"
            line = (node.meta.get("stack_trace") or "").strip().splitlines()[-2:]
            return (
                f"Operator {node.target} ({where}) has no ONNX translation. Write that part of the model with other "
                f"operators: {' '.join(part.strip() for part in line) or 'source line unknown'}"
            )
    return f"The program cannot be translated to ONNX: {first[:600]}"
