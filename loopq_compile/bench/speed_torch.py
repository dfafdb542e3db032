"""The ways in which `bench speed` runs a model in PyTorch: eager, through `torch.compile`, quantized by torchao."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from loopq_compile.errors import LoopQError
from loopq_compile.generation.decoders import Decoder
from loopq_compile.graph.scheme import Scheme
from loopq_compile.graph.texts import logits_of
from loopq_compile.program import Program

GROUP_SIZE = 32


class Way(NamedTuple):
    """How PyTorch runs a model: the type of its weights, whether `torch.compile` compiles it, and whether torchao
    quantizes its linears."""

    dtype: str
    compiled: bool = False
    torchao: bool = False


WAYS: Mapping[str, Way] = {
    "float32": Way("float32"),
    "bfloat16": Way("bfloat16"),
    "compiled": Way("float32", compiled=True),
    "torchao": Way("float32", compiled=True, torchao=True),
}
"""Ways by the names that `bench speed --pytorch` takes."""


class HuggingFaceDecoder:
    """A Hugging Face model with its own cache."""

    def __init__(self, model: Any) -> None:
        self.model, self.past = model, None

    def __call__(self, new_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """See `loopq_compile.generation.decoders.Decoder`."""
        given = {"attention_mask": attention_mask, "past_key_values": self.past, "use_cache": True}
        output = self.model(new_ids, logits_to_keep=1, **given)
        self.past = output.past_key_values
        return logits_of(output)[:, -1]


def decoders(model: nn.Module, way: Way) -> Callable[[], Decoder]:
    """Returns a function that makes fresh decoders of `model`, whose weights have the type in `way`.

    Eager Hugging Face models run unchanged. All others are captured with a growing key-value cache; one `torch.compile`
    with dynamic shapes then serves all lengths (for looped SmolLM2 it decoded as fast as transformers' model with a
    `StaticCache`: 17.4 and 17.7 tokens per second).

    Raises:
        LoopQError: the model cannot be captured, or cannot have a cache.
    """
    is_hugging_face = hasattr(model, "prepare_inputs_for_generation")
    if is_hugging_face and not way.compiled:
        return lambda: HuggingFaceDecoder(model)
    from loopq_compile.capture.to_graph import capture

    program = Program(capture(model, None if is_hugging_face else torch.ones(2, 8, dtype=torch.int64)))
    if not way.compiled:
        return program.decoder
    weights = quantized_weights(program) if way.torchao else []
    cached = program.with_cache(last_token=True)
    if way.torchao:
        quantize_with_torchao(cached.graph_module, weights)
    # A graph that is recompiled too often would silently run eagerly.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    cached.graph_module.compile(dynamic=True)
    return cached.decoder


def quantized_weights(program: Program) -> list[str]:
    """The weights of a captured program that our schemes quantize."""
    from loopq_compile.graph.state import get_state
    from loopq_compile.passes.quantize.annotate_linears import AnnotateLinears
    from loopq_compile.pipeline import Pipeline

    state = get_state(program.graph_module)
    state.scheme = Scheme.parse("w4a8", group_size=GROUP_SIZE)
    Pipeline([AnnotateLinears()]).run(program.graph_module)
    return [weight for weight, site in state.sites.items() if site.reason is None]


def quantize_with_torchao(graph_module: fx.GraphModule, weights: list[str]) -> None:
    """Quantizes linears of a captured graph in place: 4-bit weights in groups of 32, 8-bit dynamic activations.

    torchao 0.18 has no CPU kernels on x86, so weights stay unpacked, one per byte, and are dequantized in every call.

    Raises:
        LoopQError: torchao is not installed.
    """
    try:
        from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerGroup, quantize_
    except ImportError as error:
        raise LoopQError("The row needs torchao: pip install 'loopq-compile[torchao]'.") from error
    four_bits: torch.dtype = torch.int4  # type: ignore[attr-defined]
    config = Int8DynamicActivationIntxWeightConfig(weight_dtype=four_bits, weight_granularity=PerGroup(GROUP_SIZE))
    for node in graph_module.graph.nodes:
        if node.target is torch.ops.aten.linear.default and getattr(node.args[1], "target", None) in weights:
            node.target = F.linear  # torchao's tensors support this; the operator would be decomposed first
    for weight in weights:
        owner, _, leaf = weight.rpartition(".")
        module = graph_module.get_submodule(owner)
        tensor = getattr(module, leaf).detach()
        linear = nn.Linear(tensor.shape[1], tensor.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(tensor, requires_grad=False)
        quantize_(linear, config)
        setattr(module, leaf, linear.weight)
    graph_module.recompile()
