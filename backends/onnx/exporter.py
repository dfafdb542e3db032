"""The export itself: a sequence of named steps, and the options that are refused."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from loopq_compile.backends.onnx.branches import join
from loopq_compile.backends.onnx.convention import METADATA_KEY, output_names, to_json
from loopq_compile.backends.onnx.loop import LOOPS
from loopq_compile.backends.onnx.lowering import finishing, lowerings
from loopq_compile.backends.onnx.naming import IR_VERSION
from loopq_compile.backends.onnx.overview import OnnxExport, describe
from loopq_compile.backends.onnx.prepare import prepare
from loopq_compile.backends.onnx.qdq import OPSET
from loopq_compile.backends.onnx.simplify import simplify
from loopq_compile.backends.onnx.storage import FLOAT_BITS
from loopq_compile.backends.onnx.translate import translate
from loopq_compile.backends.onnx.write import EXTERNAL_DATA_THRESHOLD, check_destination, write_model
from loopq_compile.errors import LoopQError, did_you_mean
from loopq_compile.graph.caches import has_cache
from loopq_compile.graph.copies import copy_on
from loopq_compile.graph.device import CPU, device_of
from loopq_compile.graph.names import shown_name
from loopq_compile.graph.precision import in_single_precision, uses_half_precision
from loopq_compile.graph.rolled import rolled_loops
from loopq_compile.graph.state import CompilerState, attach_state, copy_graph, get_state
from loopq_compile.passes.base import Pass
from loopq_compile.passes.loops.deployment import deployment
from loopq_compile.pipeline import Pipeline

TARGETS = ("qdq", "onnxruntime")
FORMS = ("unrolled", "rolled")
PRODUCTS = ("packed", "int8", "both")
_CHOICES = {"target": TARGETS, "form": FORMS, "products": PRODUCTS}


def export(
    graph_module: fx.GraphModule,
    directory: str | os.PathLike[str],
    *,
    target: str = "qdq",
    form: str = "unrolled",
    cache: bool = False,
    last_token: bool = False,
    products: str = "packed",
    head_bits: int | None = None,
    kv_bits: int | None = None,
    early_exit: bool = False,
    float_bits: int = 32,
    overwrite: bool = True,
    external_data_threshold: int | None = None,
    skip: Collection[str] = (),
) -> OnnxExport:
    """Writes the program as `model.onnx` into `directory`.

    Quantized weights are INT4 or INT8 initializers with block-wise scales, stored once and read by every loop;
    activations pass through QuantizeLinear and DequantizeLinear. Batch and sequence are dynamic. Node names start with
    the loop (`/loop2/...`). The program is not changed. It may be one that has a cache, rolled loops or early exit
    already; `form`, `cache` and `early_exit` only add what is missing. Files compute in single precision; a program in
    half precision is exported as that, with the same stored numbers.

    Args:
        graph_module: a compiled graph (captured, quantized or not).
        directory: created if it does not exist.
        target: "qdq", only standard operators; "onnxruntime", which runs `MatMulNBits` on packed weights and computes
            with 8-bit integers where activations are quantized.
        form: "unrolled", every loop has its own nodes; "rolled", a `Loop` whose count is the input `loops` (int64,
            scalar). Loops beyond the calibrated ones read the last rows of all tables.
        cache: the file reads prompts and decodes with a key-value cache: inputs `attention_mask` `[batch, past +
            sequence]` and `past_key_values.N.key`, `.value` `[batch, heads, past, size]`, outputs `present.N.key`,
            `.value`, for every loop and layer; in form "rolled" for every layer, with the loops as first dimension.
        last_token: with a cache: `logits` are those of the last token, `[batch, 1, vocabulary]`.
        products: for target "onnxruntime". "packed": `MatMulNBits` on 4-bit weights. "int8": integer products of whole
            rows where activations are quantized; prompts and batches are several times as fast, weights take one byte
            each, and weights (per output) and activations (per token) are rounded once more, to 8 bits. "both": one
            unrolled file, packed for calls of up to three tokens, int8 for prompts and batches.
        head_bits: for target "onnxruntime". 4 or 8 rounds the weights of the language-model head, which schemes leave
            in floating point, to nearest, and its input to 8 bits. In small models the head is a large part of a step.
            Embeddings that are tied to it are looked up in the same integers.
        kv_bits: with a cache: 8 or 4 stores keys and values as integers; inputs `past_key_values.N.key_scale`,
            `.value_scale` and outputs `present.N.key_scale`, `.value_scale` hold their scales.
        early_exit: form "rolled": the loop stops when the model's exit gate reports every token as done. Adds an input
            `exit_threshold` (float32, scalar) and an output `loops_spent`. See the pass `exit-early`.
        float_bits: 16 stores the floating-point tensors (scales, embeddings, head, transforms) as float16; arithmetic
            stays in single precision.
        overwrite: whether to replace an existing `model.onnx`.
        external_data_threshold: weights of more bytes than this go to `model.onnx.data`, which ONNX Runtime maps; 64
            MiB by default.
        skip: names of lowerings to leave out, to see what they change; see `lowering`.

    Raises:
        LoopQError: an unknown or not yet available option, an operator without translation, or a directory that
            cannot be written.
    """
    _check_options(graph_module, directory, target=target, form=form, products=products)
    if form == "rolled" or rolled_loops(graph_module):
        form = "rolled"
        _check_rollable(graph_module)
    _check_products(target, form, products, head_bits)
    if float_bits not in FLOAT_BITS:
        raise LoopQError(f"float_bits must be 16 or 32; got {float_bits!r}.")
    check_destination(Path(directory), overwrite=overwrite)
    source = open_form(
        graph_module,
        rolled=form == "rolled",
        cache=cache,
        last_token=last_token,
        kv_bits=kv_bits,
        early_exit=early_exit,
    )
    model, cache = source.model, source.cache
    forms = [(model.clone(), "packed"), (model, "int8")] if products == "both" else [(model, products)]
    lowered = [lowerings(target, products=k, head_bits=head_bits).without(skip).run(part) for part, k in forms]
    model = join(*lowered) if len(lowered) > 1 else lowered[0]
    model = finishing(float_bits).run(model)
    model.ir_version = IR_VERSION
    _describe_program(model, source.state, source.outputs, target=target, form=form, cache=cache, products=products)
    threshold = EXTERNAL_DATA_THRESHOLD if external_data_threshold is None else external_data_threshold
    files = write_model(model, Path(directory), threshold=threshold)
    return describe(model, files, target=target, form=form)


@dataclass(frozen=True)
class OpenForm:
    """A translated program whose quantization, linears and attention are still opaque nodes.

    Args:
        model: what `lowerings` take.
        state: of the program as it was translated.
        outputs: as in `Prepared`.
        cache: whether it has a key-value cache.
    """

    model: ir.Model
    state: CompilerState
    outputs: list[Any]
    cache: bool


def open_form(graph_module: fx.GraphModule, *, rolled: bool = False, cache: bool = False, **options: Any) -> OpenForm:
    """Translates a program on the CPU and in single precision, with the `options` of `deployment`.

    Raises:
        LoopQError: the program cannot have this form, or has an operator without translation.
    """
    if device_of(graph_module) != CPU:
        graph_module = copy_on(graph_module, CPU)
    if uses_half_precision(graph_module):
        graph_module = in_single_precision(graph_module)
    passes = deployment(graph_module, cache=cache, rolled=rolled, **options)
    graph_module = _rewritten(graph_module, passes) if passes else graph_module
    cache = has_cache(get_state(graph_module).signature)
    if cache and any(loop.skipped for loop in rolled_loops(graph_module)):
        raise LoopQError(
            "The first iteration of this loop differs from the others and stays before it. Its cache cannot be part "
            "of the loop's cache: use form='unrolled'."
        )
    state = get_state(graph_module)
    prepared = prepare(graph_module)
    model = translate(prepared, state.signature, output_names(state.signature, prepared.outputs), OPSET)
    simplify(model)
    return OpenForm(model, state, prepared.outputs, cache)


def _check_rollable(graph_module: fx.GraphModule) -> None:
    state = get_state(graph_module)
    if not state.loops.loops:
        raise LoopQError("This program has no loop to roll; use form='unrolled'.")
    if any(spec.name == LOOPS for spec in state.signature.inputs):
        raise LoopQError(f"The model has an input {LOOPS!r} of its own, which the rolled form needs; rename it.")


def _rewritten(graph_module: fx.GraphModule, passes: list[Pass]) -> fx.GraphModule:
    """A copy of the graph after `passes`."""
    copied = copy_graph(graph_module)
    attach_state(copied, replace(get_state(graph_module), log=[]))
    return Pipeline(passes).run(copied)


def _check_products(target: str, form: str, products: str, head_bits: int | None) -> None:
    if head_bits is not None and (head_bits not in (4, 8) or target != "onnxruntime"):
        raise LoopQError(f"head_bits must be 4 or 8, with target='onnxruntime'; got {head_bits!r}, target={target!r}.")
    if products != "packed" and target != "onnxruntime":
        raise LoopQError(f"products={products!r} goes with target='onnxruntime'; got target={target!r}.")
    if products == "both" and form == "rolled":
        # Inside both a branch and a loop, results differ from those of a packed file (ONNX Runtime 1.32).
        raise LoopQError("products='both' is for form='unrolled'; rolled files have 'packed' or 'int8' ones.")


def _check_options(graph_module: Any, directory: Any, **chosen: str) -> None:
    if not isinstance(graph_module, fx.GraphModule):
        raise LoopQError(f"export takes the graph module of a program; got {type(graph_module).__name__}.")
    if not isinstance(directory, str | os.PathLike) or not os.fspath(directory):
        raise LoopQError(f"directory must be a path; got {directory!r}.")
    for option, value in chosen.items():
        if value not in _CHOICES[option]:
            raise LoopQError(f"Unknown ONNX {option} {value!r}.{did_you_mean(str(value), _CHOICES[option])}")
    for node in graph_module.graph.nodes:
        dtype = getattr(node.meta.get("val"), "dtype", None)
        if node.target is torch.ops.aten.linear.default and dtype is torch.float64:
            raise LoopQError(
                f"{shown_name(node.name)!r} computes in float64; ONNX files of this version are float32: compile "
                "model.float()."
            )


def _describe_program(
    model: ir.Model, state: CompilerState, outputs: list[Any], *, target: str, form: str, cache: bool, products: str
) -> None:
    for node in model.graph.all_nodes():
        if node.op_type == "Loop":
            node.metadata_props["loopq.structure"] = state.loops.describe()
    model.producer_name, model.producer_version = "loopq_compile", _version()
    model.doc_string = None
    model.metadata_props.clear()
    model.metadata_props[METADATA_KEY] = to_json(state.signature, outputs)
    model.metadata_props["loopq.program"] = json.dumps(
        {
            "model": state.model_name,
            "method": state.method,
            "scheme": state.scheme.to_dict() if state.scheme else None,
            "loops": state.loops.count,
            "structure": state.loops.describe(),
            "target": target,
            "form": form,
            "cache": cache,
            **({"products": products} if target == "onnxruntime" else {}),
            # The count that the tables were calibrated for; to be fed if the model asks for one.
            **({"loops_input": LOOPS, "loops_default": state.loops.count} if form == "rolled" else {}),
        }
    )


def _version() -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version("loopq-compile")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
