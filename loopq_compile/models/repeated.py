"""Makes looped models from ordinary ones: some layers of a Hugging Face model run several times, on the same weights.

Models that are retrofitted with a loop start like this. Repeating layers costs quality until the model is trained
further. The result is a looped model with real weights, real outliers and a tokenizer, at no cost.
"""

from __future__ import annotations

import copy
import re
from typing import Any, NamedTuple

from torch import nn

from loopq_compile.errors import LoopQError

_ATTENTION_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}
"""Layers whose only memory between calls is a key-value cache, one entry per position in the list of layers."""


class Repeat(NamedTuple):
    """Layers `first` to `last` (both included, counted from 0) run `times` times in a row."""

    first: int
    last: int
    times: int

    @staticmethod
    def parse(text: str) -> Repeat:
        """From `"12-15x3"`, or `"12x3"` for a single layer.

        Raises:
            LoopQError: the text has another form.
        """
        match = re.fullmatch(r"(\d+)(?:-(\d+))?x(\d+)", text.strip())
        if match is None:
            raise LoopQError(f"Cannot read {text!r} as layers to repeat; write FIRST-LASTxTIMES, such as 12-15x3.")
        first, last, times = match.groups()
        return Repeat(int(first), int(last or first), int(times))

    def __str__(self) -> str:
        return f"{self.first}-{self.last}x{self.times}"


def repeat_layers(model: Any, first: int, last: int, times: int) -> Any:
    """Makes `model` looped: layers `first` to `last` run `times` times in a row, with the same weights.

    Every position in the new list of layers is a view of a layer: it has the layer's parameters and its own index, by
    which attention finds its entry in the key-value cache, so `model.generate` works.

    Args:
        model: a causal language model of transformers whose decoder keeps its layers in `layers` (Llama, Qwen, Mistral,
            Gemma and similar ones). It is changed in place; `model.config.num_hidden_layers` becomes the number of
            calls.
        first, last: the range of layers, both included, counted from 0.
        times: how often the range runs; 1 leaves the model unchanged.

    Returns:
        `model`, in evaluation mode.

    Raises:
        LoopQError: there are no such layers, or layers of this model cannot be repeated; the message says why.
    """
    decoder = _decoder(model)
    layers = list(decoder.layers)
    if not 0 <= first <= last < len(layers):
        raise LoopQError(f"Layers {first}-{last} cannot be repeated: {type(model).__name__} has 0-{len(layers) - 1}.")
    if times < 1:
        raise LoopQError(f"Layers can be repeated once or more often; got times={times}.")
    order = [*range(first), *[*range(first, last + 1)] * times, *range(last + 1, len(layers))]
    decoder.layers = nn.ModuleList(_view(layers[old], new) for new, old in enumerate(order))
    config: Any = getattr(decoder, "config", None)
    if getattr(config, "layer_types", None):  # before the number of layers, which is checked against it
        kinds = list(config.layer_types)
        config.layer_types = [kinds[old] for old in order]
    config.num_hidden_layers = len(order)
    return model.eval()


def _decoder(model: Any) -> Any:
    """The module that holds the layers; checks that they can be repeated."""
    name = type(model).__name__
    base = getattr(model, getattr(model, "base_model_prefix", ""), None)
    decoder = getattr(base, "language_model", base)
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise LoopQError(
            f"{name} has no list of layers where Llama-like Hugging Face models keep it (model.model.layers), so none "
            "can be repeated."
        )
    config: Any = getattr(decoder, "config", None)
    if getattr(config, "num_hidden_layers", None) != len(layers):
        raise LoopQError(f"{name} keeps {len(layers)} layers, its configuration says otherwise; none can be repeated.")
    for layer in layers:
        if not any(hasattr(module, "layer_idx") for module in layer.modules()):
            raise LoopQError(f"{name} has layers that do not know their index; a key-value cache would mix them up.")
    others = set(getattr(config, "layer_types", None) or ()) - _ATTENTION_KINDS
    if others or getattr(config, "is_encoder_decoder", False) or getattr(config, "num_kv_shared_layers", None):
        kind = ", ".join(sorted(others)) or "keys and values of other layers"
        raise LoopQError(f"{name} has layers that keep more than their own keys and values ({kind}).")
    return decoder


def _view(module: nn.Module, index: int) -> nn.Module:
    """`module` with its own index; parameters, and modules without an index, are shared."""
    view = copy.copy(module)
    view._modules = {
        name: _view(child, index)
        if child is not None and any(hasattr(below, "layer_idx") for below in child.modules())
        else child
        for name, child in module._modules.items()
    }
    if hasattr(view, "layer_idx"):
        view.layer_idx = index  # type: ignore[assignment]
    return view
