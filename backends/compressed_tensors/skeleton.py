"""The model that an engine builds from the configuration: which tensors it loads, and which of its modules are linear.

It is built without memory for weights (PyTorch's device `meta`). What the program holds must fit it name by name.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from loopq_compile.backends.compressed_tensors.source import Source, plain_references
from loopq_compile.errors import LoopQError, first_line
from loopq_compile.graph.state import CompilerState

_TIED = "tie_word_embeddings"


@dataclass(frozen=True)
class Skeleton:
    """A model without weights.

    Args:
        model: the module on device `meta`.
        config: its configuration, an object of transformers.
        stored: names of the tensors that its files hold, with their shapes; of those that it ties, the first name.
        linears: names of its linear layers.
    """

    model: nn.Module
    config: Any
    stored: Mapping[str, torch.Size]
    linears: tuple[str, ...]


def build_skeleton(state: CompilerState, source: Source, quantized: set[str]) -> Skeleton:
    """Builds the captured class from the captured configuration.

    A weight that is quantized in a linear layer and is also an embedding is two tensors in the files; then the
    configuration stops tying them.

    Args:
        state: of the program.
        source: where the model's code is.
        quantized: first names of quantized weights.

    Raises:
        LoopQError: there is no such class or no configuration, or it cannot be built.
    """
    if not state.origin.config:
        raise LoopQError(
            f"The program does not know a configuration of transformers for {state.model_name}: it was compiled from "
            "another kind of model, or by an older version. Compile the transformers model again, or export as ONNX."
        )
    kind = source.model_class(state.model_name, state.origin)
    try:
        config = kind.config_class.from_dict(dict(state.origin.config))
        model = _build(kind, config)
        if config.to_dict().get(_TIED) and _splits(model, state.origin.aliases, quantized):
            setattr(config, _TIED, False)
            model = _build(kind, config)
    except LoopQError:
        raise
    except Exception as error:  # code of a model may raise anything
        raise LoopQError(
            f"{state.model_name} cannot be built from its configuration: {first_line(error)}. Export the program as "
            "ONNX."
        ) from error
    if auto_map := getattr(config, "auto_map", None):
        config.auto_map = plain_references(auto_map)
    linears = tuple(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return Skeleton(model, config, _stored(model), linears)


def _build(kind: Any, config: Any) -> nn.Module:
    with torch.device("meta"):
        model = kind(config).eval()
    model.tie_weights()
    return model


def _groups(model: nn.Module) -> list[list[str]]:
    """Names of the tensors that files hold; those that are one tensor stand together."""
    groups: dict[int, list[str]] = defaultdict(list)
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups[id(tensor)].append(name)
    return list(groups.values())


def _stored(model: nn.Module) -> dict[str, torch.Size]:
    tied: Any = getattr(model, "_tied_weights_keys", None) or ()
    tensors = model.state_dict(keep_vars=True)
    firsts = []
    for group in _groups(model):
        own = [name for name in group if not any(re.search(key, name) for key in tied)]
        firsts.append((own or group)[0])
    return {name: tensors[name].shape for name in firsts}


def _splits(model: nn.Module, aliases: Mapping[str, str], quantized: set[str]) -> bool:
    """Whether one tensor is a quantized linear under one name, and something else under another."""
    modules = dict(model.named_modules())
    for group in _groups(model):
        kinds = {isinstance(modules[name.rpartition(".")[0]], nn.Linear) for name in group}
        if len(kinds) > 1 and any(aliases.get(name, name) in quantized for name in group):
            return True
    return False
