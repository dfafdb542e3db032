"""Example inputs of a model: the argument that each belongs to, and which of its dimensions vary."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from sympy import Eq
from torch import Tensor, nn
from torch.export import Dim

from loopq_compile.errors import LoopQError
from loopq_compile.graph.conditions import evaluate
from loopq_compile.graph.signature import NO_CACHE, is_cache

EXAMPLE_BATCH, EXAMPLE_LENGTH = 2, 17
"""Sizes of examples made here: not 1, which the exporter specialises, and not equal, which would be ambiguous."""

PER_TOKEN = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids", "labels")
"""Arguments of Hugging Face models with one entry per token: `[batch, sequence]`, for embeddings also features."""

Dimensions = dict[str, dict[int, str]]
"""Names of the dimensions that may vary, by input: `{"input_ids": {0: "batch", 1: "sequence"}}`."""


def bind_example(model: nn.Module, example_inputs: Any) -> tuple[list[str], dict[str, Any]]:
    """Names of all parameters of `forward`, and the example's arguments by name."""
    parameters = inspect.signature(model.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if example_inputs is None:
        return names, _causal_lm_example(model, names)
    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    if isinstance(example_inputs, Mapping):
        arguments = dict(example_inputs)
        unknown = [name for name in arguments if name not in names]
        if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters):
            raise LoopQError(f"{type(model).__name__}.forward has no argument {unknown[0]!r}; it takes {names}.")
        names += unknown
    elif isinstance(example_inputs, tuple | list):
        rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
        if rest is not None:  # forward(*args): args_0, args_1, ...
            first = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
            more = [f"{rest}_{i}" for i in range(len(example_inputs) - len(first))]
            names = [*first, *more, *(name for name in names if name not in first)]
        if len(example_inputs) > len(names):
            raise LoopQError(f"{len(example_inputs)} example inputs, but {type(model).__name__}.forward takes {names}.")
        arguments = dict(zip(names, example_inputs, strict=False))
    else:
        raise LoopQError(
            f"example_inputs must be a tensor, a tuple or a dict of tensors; got {type(example_inputs).__name__}."
        )
    if any(is_cache(name, value) for name, value in arguments.items()):
        raise LoopQError(NO_CACHE)
    for name, value in arguments.items():
        if not isinstance(value, Tensor | None | bool | int | float | str):
            raise LoopQError(f"example input {name!r} must be a tensor or a plain value; got {type(value).__name__}.")
    if not any(isinstance(value, Tensor) for value in arguments.values()):
        raise LoopQError("example_inputs holds no tensor.")
    if "use_cache" in names:
        arguments.setdefault("use_cache", False)  # a program keeps no state
    return names, arguments


def split_call(model: nn.Module, values: Mapping[str, Any]) -> tuple[dict[str, Any], str | None, dict[str, Any]]:
    """Splits `values` (by argument name) into positional and keyword arguments; also returns the name of `*args`, if
    any.

    Positional arguments are used only if the example fills the `*args` of `forward`.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
    first = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    filled = [name for name in values if rest is not None and re.fullmatch(rf"{rest}_\d+", name)]
    if not filled:
        only = {p.name for p in parameters if p.kind is p.POSITIONAL_ONLY}
        positional = {name: value for name, value in values.items() if name in only}
        return positional, None, {name: value for name, value in values.items() if name not in only}
    positional = {name: values[name] for name in [*first, *filled]}
    return positional, rest, {name: value for name, value in values.items() if name not in positional}


def _causal_lm_example(model: nn.Module, names: list[str]) -> dict[str, Any]:
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if not isinstance(vocabulary, int) or "input_ids" not in names:
        raise LoopQError(
            f"{type(model).__name__} is not a Hugging Face causal language model: give example_inputs, for instance "
            "torch.randint(0, vocab_size, (2, 16))."
        )
    generator = torch.Generator("cpu").manual_seed(0)
    chunk = getattr(model.config, "chunk_size", None)  # scans in chunks branch on the number of chunks
    length = chunk + 1 if isinstance(chunk, int) and chunk >= EXAMPLE_LENGTH else EXAMPLE_LENGTH
    ids = torch.randint(0, vocabulary, (EXAMPLE_BATCH, length), generator=generator, device="cpu")
    return {"input_ids": ids} | ({"use_cache": False} if "use_cache" in names else {})


def main_input(arguments: Mapping[str, Any]) -> str:
    """The input that defines batch and sequence."""
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    for name, value in tensors.items():
        if 0 in value.shape:
            raise LoopQError(f"example input {name!r} is empty: shape {list(value.shape)}.")
    integer = [name for name, value in tensors.items() if value.ndim >= 2 and not value.is_floating_point()]
    deep = [name for name, value in tensors.items() if value.ndim >= 2]
    if not deep:
        name, value = next(iter(tensors.items()))
        raise LoopQError(
            f"example input {name!r} has shape {list(value.shape)}; a batch dimension is needed: x.unsqueeze(0)."
        )
    return next((name for name in PER_TOKEN[:2] if name in deep), (integer or deep)[0])


def name_dimensions(arguments: Mapping[str, Any]) -> Dimensions:
    """Names the dimensions that are as long as batch or sequence of the main input; those of the main input come first.

    Integers `[batch, n]` are tokens of another length, such as targets, and `[batch * sequence]` are flattened ones.
    The exporter finds out whether such a size is fixed, free, or follows from the main input's. `sequence -1` says how
    the example is resized.
    """
    main = main_input(arguments)
    batch, length = arguments[main].shape[:2]
    has_sequence = arguments[main].ndim >= 3 or not arguments[main].is_floating_point()
    named: Dimensions = {}
    for name, value in arguments.items():
        sizes = tuple(value.shape) if isinstance(value, Tensor) else ()
        named[name] = {0: "batch"} if sizes[:1] == (batch,) else {}
        if has_sequence and name == main:
            named[name][1] = "sequence"
        elif has_sequence:
            found = [i for i, size in enumerate(sizes) if size == length and i not in named[name]]
            if length > 1 or len(found) == 1:  # several dimensions of size 1 are probably meant to be broadcast
                named[name] |= dict.fromkeys(found, "sequence")
            tokens = bool(sizes) and has_sequence and length > 1 and not value.is_floating_point()
            if tokens and len(sizes) == 2 and list(named[name]) == [0] and sizes[1] > 1:
                named[name][1] = f"sequence {sizes[1] - length:+d}"
            if tokens and sizes == (batch * length,) and batch > 1:
                named[name] = {0: "batch * sequence"}
    return named


def separate(arguments: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The example with a separate tensor for each input, on the model's `device`.

    The exporter treats one tensor object as one value: if an input were the same object as another input or a weight,
    the two would be merged. Inputs must not share memory either, since the model might write to it.
    """
    return {
        name: value.detach().to(device, copy=True) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }


def widen(arguments: dict[str, Any], named: Dimensions) -> dict[str, Any]:
    """Repeats the example until neither batch nor sequence is 1 and the two differ."""
    batch, length = arguments[main_input(arguments)].shape[:2]
    new_length = EXAMPLE_LENGTH if length == 1 else length
    new_batch = next(n for n in range(max(batch, 2), max(batch, 2) + 2) if n != new_length)
    return resize(arguments, named, {"batch": new_batch, "sequence": new_length})


def resize(arguments: Mapping[str, Any], named: Dimensions, sizes: Mapping[str, int]) -> dict[str, Any]:
    """The example with other `sizes` of named dimensions: its first entries, preceded by repeats of the very first."""
    resized = dict(arguments)
    for name, dims in named.items():
        for i, dim in dims.items():
            value = resized[name]
            size = evaluate(dim, sizes)
            missing = size - value.shape[i]
            if missing > 0:
                first = value.narrow(i, 0, 1)
                resized[name] = torch.cat([value, first.expand(*value.shape[:i], missing, *value.shape[i + 1 :])], i)
            else:
                resized[name] = value.narrow(i, 0, max(size, 0))
    return resized


def dynamic_shapes(arguments: Mapping[str, Any], named: Dimensions) -> dict[str, Any]:
    """The dynamic shapes for `torch.export`. The batch and a sequence of tokens must vary; others may turn out
    fixed."""
    main = main_input(arguments)
    shapes: dict[str, Any] = {}
    for name, value in arguments.items():
        tokens = name == main and (name in PER_TOKEN or not value.is_floating_point())
        shapes[name] = None
        if isinstance(value, Tensor):
            shapes[name] = {i: Dim.DYNAMIC if dim == "batch" or tokens else Dim.AUTO for i, dim in named[name].items()}
    return shapes


def read_shapes(values: Mapping[str, Tensor], named: Dimensions, main: str) -> dict[str, tuple[int | str, ...]]:
    """Shapes of the captured inputs, with the names of dimensions that vary. `values` are the exporter's tensors.

    Inputs with an entry per token keep the names they had in the example, although the exporter gives them separate
    symbols: it lets a mask of another batch be broadcast, and labels have any length. The same holds for inputs whose
    sizes it found to be equal, taken together, to those of the main input (flattened labels, for example).
    """
    known = {str(values[main].shape[i]): dim for i, dim in named[main].items()}
    env = getattr(getattr(values[main], "fake_mode", None), "shape_env", None)
    equal = [{str(s) for s in guard.expr.free_symbols} for guard in getattr(env, "guards", ()) if guard.expr.has(Eq)]
    tied = set().union(*(symbols for symbols in equal if symbols & set(known)))

    def read(name: str, i: int, size: int | torch.SymInt) -> int | str:
        expression = str(size)  # "s70", or "16" where the model turned out to need this size
        other = named[name].get(i) if name in PER_TOKEN or expression in tied else None
        other = other if other in ("batch", "sequence") else None
        return int(expression) if expression.isdigit() else known.get(expression, other or f"{name}_{i}")

    return {name: tuple(read(name, i, size) for i, size in enumerate(value.shape)) for name, value in values.items()}
