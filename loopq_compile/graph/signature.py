"""The calling convention of a program: how `model(input_ids, attention_mask=mask)` becomes a call of its graph."""

from __future__ import annotations

import contextlib
import importlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from loopq_compile.errors import LoopQError, did_you_mean
from loopq_compile.graph.conditions import SizeCondition, check_condition_names, check_conditions

PAST = "past"
"""Dimension of the tokens in a key-value cache, the only one that may be 0."""
LOOPS_AXIS = "loops"
"""Dimension of the iterations of a loop that share a cache."""
TOTAL = f"{PAST} + sequence"
"""Dimension of all tokens, cached and new ones."""
NO_CACHE = (
    "A program takes no key-value cache (past_key_values) and reads the whole sequence in every call; leave it out "
    "(use_cache=False). program.with_cache() and program.as_hugging_face() keep keys and values from call to call."
)


def is_cache(name: str, value: Any) -> bool:
    """Whether an argument is a key-value cache of a Hugging Face model; its name depends on the release."""
    return value is not None and (name == "past_key_values" or hasattr(value, "get_seq_length"))


@dataclass(frozen=True)
class InputSpec:
    """One tensor input of a graph. Dimensions are sizes, or names such as "batch" for those that may vary.

    A name may be a sum of others, such as "past + sequence".
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {str(self.dtype).removeprefix('torch.')}[{', '.join(map(str, self.shape))}]"


@dataclass
class Signature:
    """Parameter names of the captured `forward`, its tensor inputs, constants and output structure.

    Args:
        parameters: all parameter names, in positional order.
        inputs: parameters that were tensors at capture, in the order of the graph's placeholders.
        constants: parameters that were plain values (`None`, flags, numbers); they are part of the graph.
        outputs: how the graph's flat list of results becomes what the model returns.
        conditions: what the sizes of a call must meet, if the model branches on sizes. With a cache, `sequence` means
            all tokens there, cached and new ones.
        captured: sizes of the example by name of dimension; empty if only batch and sequence vary, without conditions.
    """

    parameters: tuple[str, ...]
    inputs: tuple[InputSpec, ...]
    constants: dict[str, Any]
    outputs: pytree.TreeSpec
    conditions: tuple[SizeCondition, ...] = ()
    captured: dict[str, int] = field(default_factory=dict)

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """Tensors in placeholder order for a call `(*args, **kwargs)`.

        Raises:
            LoopQError: an argument is unknown, missing or given twice, has a wrong type or shape, or is a constant
                whose value differs from that at capture.
        """
        if len(args) > len(self.parameters):
            raise LoopQError(f"Got {len(args)} positional arguments, the program takes {len(self.parameters)}.")
        given = dict(zip(self.parameters, args, strict=False))
        if any(is_cache(name, value) for name, value in [*given.items(), *kwargs.items()]):
            raise LoopQError(NO_CACHE)
        for name, value in kwargs.items():
            if name in given:
                raise LoopQError(f"Argument {name!r} is given twice.")
            if name not in self.parameters:
                raise LoopQError(f"The program has no argument {name!r}.{did_you_mean(name, self.parameters)}")
            given[name] = value
        tensors: list[Tensor] = []
        for spec in self.inputs:
            if given.get(spec.name) is None:
                raise LoopQError(f"Input {spec.name!r} is missing; this program was captured with {self.describe()}.")
            tensors.append(_checked(spec, self._broadcast(spec, given.pop(spec.name), tensors)))
        for name, value in given.items():
            captured = self.constants.get(name)
            if value is not None and (isinstance(value, Tensor) or value != captured):
                now = "a tensor" if isinstance(value, Tensor) else repr(value)
                raise LoopQError(
                    f"Argument {name!r} was captured as {captured!r}, now it is {now}; give it in example_inputs and "
                    "compile again."
                )
        self._check_shared_dimensions(tensors)
        return tensors

    def check_sizes(self, sizes: Mapping[str, int]) -> None:
        """Refuses sizes (by name of dimension) at which the model computes something other than the captured graph.

        Raises:
            LoopQError: names the condition and the line of the model.
        """
        if self.conditions:
            text = {"sequence": sizes[TOTAL]} if TOTAL in sizes else {}
            check_conditions(self.conditions, {**sizes, **text}, self.captured)

    def restore(self, flat: Sequence[Any]) -> Any:
        """Rebuilds what the model would return from the graph's flat results."""
        return pytree.tree_unflatten(list(flat), self.outputs)

    def describe(self) -> str:
        """Such as `(input_ids: int64[batch, sequence], use_cache=False)`."""
        constants = [f"{name}={value!r}" for name, value in self.constants.items() if value is not None]
        return f"({', '.join([*map(str, self.inputs), *constants])})"

    def _broadcast(self, spec: InputSpec, value: Any, others: Sequence[Tensor]) -> Any:
        """`value`; if it is one row (positions, a mask), it is expanded to all rows of the first input."""
        batch = others and self.inputs[0].shape[:1] == spec.shape[:1] == ("batch",)
        if batch and isinstance(value, Tensor) and value.shape[:1] == (1,):
            return value.expand(len(others[0]), *value.shape[1:])
        return value

    def _check_shared_dimensions(self, tensors: Sequence[Tensor]) -> None:
        seen: dict[str, tuple[str, int]] = {}
        for spec, tensor in zip(self.inputs, tensors, strict=True):
            for name, size in zip(spec.shape, tensor.shape, strict=True):
                if isinstance(name, str) and seen.setdefault(name, (spec.name, size))[1] != size:
                    other, expected = seen[name]
                    raise LoopQError(f"Inputs disagree on {name!r}: {other} has {expected}, {spec.name} has {size}.")
        for name, (owner, size) in seen.items():
            parts = name.split(" + ")
            if len(parts) > 1 and all(part in seen for part in parts):
                sizes = [seen[part][1] for part in parts]
                if size != sum(sizes):
                    made = " + ".join(map(str, sizes))
                    raise LoopQError(f"{owner} has {name!r} = {size}, the other inputs make it {made}.")
        self.check_sizes({name: size for name, (_, size) in seen.items()})


def _checked(spec: InputSpec, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise LoopQError(f"Input {spec.name!r} must be a tensor {spec}; got {type(value).__name__}.")
    integers = (torch.int64, torch.int32)
    if value.dtype != spec.dtype and not (value.dtype in integers and spec.dtype in integers):
        raise LoopQError(f"Input {spec.name!r} has type {value.dtype}; the program was captured with {spec.dtype}.")
    sizes = tuple(value.shape)
    fits = len(sizes) == len(spec.shape) and all(
        isinstance(want, str) or want == size for want, size in zip(spec.shape, sizes, strict=True)
    )
    if not fits:
        hint = " Add a batch dimension: x.unsqueeze(0)." if len(sizes) == len(spec.shape) - 1 else ""
        raise LoopQError(f"Input {spec.name!r} has shape {list(sizes)}; the program takes {spec}.{hint}")
    if any(size == 0 and want != PAST for want, size in zip(spec.shape, sizes, strict=True)):
        raise LoopQError(f"Input {spec.name!r} is empty: shape {list(sizes)}.")
    return value.to(spec.dtype)


def result_names(outputs: pytree.TreeSpec) -> list[str]:
    """The name of every flat result, such as `logits` or `past_key_values.0`; "" where the structure has none."""
    try:
        numbered = pytree.tree_unflatten(list(range(outputs.num_leaves)), outputs)
        paths = {leaf: path for path, leaf in pytree.tree_flatten_with_path(numbered)[0]}
    except ValueError:  # a container that does not name its parts, as in transformers 4, but is a mapping
        paths = {}
        if isinstance(numbered, Mapping):
            paths = {leaf: (pytree.MappingKey(key),) for key, leaf in numbered.items() if isinstance(leaf, int)}
    except Exception:  # a user's own container may refuse numbers in place of tensors
        paths = {}
    names = []
    for leaf in range(outputs.num_leaves):
        parts = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", "")))) for k in paths.get(leaf, ())]
        names.append(".".join(parts) if parts and not parts[0].isdigit() else "")
    return names


def named_results(outputs: pytree.TreeSpec, values: Sequence[Any]) -> list[str]:
    """Names for the flat results of a program that will return a dict: their own if they have one.

    The first unnamed result over batch, sequence and vocabulary is called logits, as readers of files expect. If there
    is none, the very first result gets that name if it runs over batch and vocabulary: logits of the last token.

    Args:
        outputs: the structure the results have now.
        values: the results; fake tensors are allowed.
    """
    names = result_names(outputs)
    made: list[str] = []
    ranks = [value.ndim if isinstance(value, Tensor) else None for value in values]
    place = ranks.index(3) if 3 in ranks else 0
    for number, (name, rank) in enumerate(zip(names, ranks, strict=True)):
        if not name:
            is_logits = "logits" not in (*names, *made) and (rank == 3 or (rank == 2 and number == place))
            name = "logits" if is_logits else f"output_{number}"
        made.append(name)
    return made


def signature_to_dict(signature: Signature) -> dict[str, Any]:
    """Plain values for JSON. An output type that PyTorch cannot name in a file becomes a dict by field name."""
    try:
        outputs = json.loads(pytree.treespec_dumps(signature.outputs))
    except (NotImplementedError, TypeError, ValueError):
        named = {name or str(i): 0 for i, name in enumerate(result_names(signature.outputs))}
        outputs = json.loads(pytree.treespec_dumps(pytree.tree_structure(named)))
    conditions = [[condition.text, condition.where] for condition in signature.conditions]
    return {
        "parameters": list(signature.parameters),
        "inputs": [[spec.name, str(spec.dtype).removeprefix("torch."), list(spec.shape)] for spec in signature.inputs],
        "constants": signature.constants,
        "outputs": outputs,
        **({"conditions": conditions} if conditions else {}),
        **({"captured": signature.captured} if signature.captured else {}),
    }


def signature_from_dict(data: Mapping[str, Any]) -> Signature:
    """Inverse of `signature_to_dict`.

    Raises:
        LoopQError: the output type belongs to a package that is not installed.
    """
    _check_outputs(data["outputs"])
    text = json.dumps(data["outputs"])
    _import_output_types(text)
    try:
        outputs = pytree.treespec_loads(text)
    except (NotImplementedError, ValueError) as error:
        raise LoopQError(f"the program returns a type that is not known here: {error}") from error
    inputs = tuple(_input_from_json(*entry) for entry in data["inputs"])
    conditions = tuple(SizeCondition(str(text), str(where)) for text, where in data.get("conditions", ()))
    captured = {str(name): int(size) for name, size in data.get("captured", {}).items()}
    check_condition_names(conditions, captured)
    return Signature(tuple(data["parameters"]), inputs, dict(data["constants"]), outputs, conditions, captured)


def _input_from_json(name: str, dtype: str, shape: list[int | str]) -> InputSpec:
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise LoopQError(f"input {name!r} has the unknown type {dtype!r}")
    if not all(isinstance(size, str) or 0 < size < 1 << 24 for size in shape):
        raise LoopQError(f"input {name!r} has the impossible shape {shape}")
    return InputSpec(str(name), found, tuple(shape))


def _check_outputs(value: Any) -> None:
    """Refuses names of modules: PyTorch would import what a file names for enumerations and default factories.

    Raises:
        LoopQError: the structure names a module.
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        with contextlib.suppress(ValueError):
            _check_outputs(json.loads(value))
    elif isinstance(value, Mapping):
        module, name = value.get("default_factory_module", "builtins"), value.get("default_factory_name", "list")
        if "__enum__" in value or module != "builtins" or name not in ("list", "dict", "set", "int", "float", "str"):
            raise LoopQError("its output structure names code to import, which is refused")
        for item in value.values():
            _check_outputs(item)
    elif isinstance(value, list):
        for item in value:
            _check_outputs(item)


def _import_output_types(text: str) -> None:
    """Imports the modules of output types, which register themselves; only these two packages are allowed."""
    if '"loopq_compile.models.' in text:
        importlib.import_module("loopq_compile.models")
    for name in sorted(set(re.findall(r'"(transformers(?:\.\w+)+)\.\w+"', text))):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
