"""Reads from a model what its graph does not show: its configuration, and all names of shared tensors."""

from __future__ import annotations

import itertools
import json
from typing import Any

from torch import Tensor, nn

from loopq_compile.graph.origin import Origin


def identity(tensor: Tensor) -> tuple[Any, ...]:
    """A key that is equal for two names of the same tensor."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def first_names(model: nn.Module) -> dict[tuple[Any, ...], str]:
    """The first name of every tensor; the exporter's choice among several names is arbitrary."""
    names: dict[tuple[Any, ...], str] = {}
    for name, tensor in _all_names(model):
        names.setdefault(identity(tensor), name)
    return names


def read_origin(model: nn.Module) -> Origin:
    """Configuration and shared names of `model`."""
    first = first_names(model)
    aliases = {name: first[identity(tensor)] for name, tensor in _all_names(model)}
    return Origin(_config(model), {name: found for name, found in aliases.items() if found != name})


def _all_names(model: nn.Module) -> Any:
    return itertools.chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))


def _config(model: nn.Module) -> dict[str, Any]:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_json_string") or not hasattr(config, "model_type"):
        return {}
    try:
        return dict(json.loads(config.to_json_string(use_diff=False)))
    except (TypeError, ValueError):  # a configuration with values that JSON does not have cannot be written anywhere
        return {}
