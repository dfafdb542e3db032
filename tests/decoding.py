"""Small causal models, and checks that a key-value cache changes no logits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import loopq_compile as lq
from loopq_compile.capture.to_graph import capture
from loopq_compile.graph.signature import Signature
from loopq_compile.graph.texts import logits_of
from loopq_compile.models import Huginn, LoopFormer, LoopFormerConfig, Nanbeige, Ouro, OuroConfig, Parcae, repeat_layers
from loopq_compile.passes.loops.tag_loops import TagLoops
from tests.looped_models import HUGINN, NANBEIGE, PARCAE, UniversalTransformer, with_random_weights
from tests.tiny import TinyLoopedLM, tiny_model

VOCABULARY = 64


def ids(batch: int = 2, length: int = 10, seed: int = 0) -> Tensor:
    """Random token ids."""
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded() -> dict[str, Tensor]:
    """Two rows with their mask, the second padded on the left by three tokens."""
    tokens, mask = ids(2, 7), torch.ones(2, 7, dtype=torch.int64)
    tokens[1, :3] = mask[1, :3] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def ouro() -> nn.Module:
    """Norm and gate in the loop, grouped queries, rotary tables, and its own padding mask."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return Ouro(OuroConfig(vocab_size=VOCABULARY, num_key_value_heads=2, total_ut_steps=3, **sizes))


def loopformer() -> nn.Module:
    """Learned positions, no mask."""
    config = LoopFormerConfig(block_size=32, vocab_size=VOCABULARY, n_layer=1, n_head=4, n_embd=32, intermediate_dim=64)
    return LoopFormer(config, steps=(0.5, 0.3, 0.2))


def llama(attention: str = "sdpa") -> nn.Module:
    """A Hugging Face model with grouped queries, its middle layer run twice."""

    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=attention,
    )
    return repeat_layers(transformers.LlamaForCausalLM(config), 1, 1, 2)


class SlicedPositions(nn.Module):
    """Keys come from another layer than queries; positions are `table[:length]`; the mask is a stored triangle."""

    def __init__(self, visible: int = 0) -> None:
        super().__init__()
        self.embed, self.table = nn.Embedding(VOCABULARY, 16), nn.Parameter(torch.randn(24, 16))
        self.q, self.kv, self.head = nn.Linear(16, 16), nn.Linear(16, 32), nn.Linear(16, VOCABULARY)
        self.register_buffer("triangle", torch.ones(24, 24, dtype=torch.bool).tril(visible))

    def forward(self, input_ids: Tensor) -> Tensor:
        length = input_ids.shape[1]
        x = self.embed(input_ids) + self.table[:length]
        for _ in range(2):
            k, v = self.kv(x).chunk(2, -1)
            scores = self.q(x) @ k.transpose(1, 2) / 4
            x = x + F.softmax(scores.masked_fill(~self.triangle[:length, :length], -1e9), -1) @ v
        return self.head(x)


class ExitByThreshold(TinyLoopedLM):
    """The head reads, for every token, the state of the first loop whose cumulative exit probability is high enough."""

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        x, states, gates = self.embed(input_ids), [], []
        for _ in range(self.loops):
            for layer in self.layers:
                x = layer(x)
            x = self.norm(x)
            states.append(x)
            gates.append(self.exit_gate(x).sigmoid())
        reached = torch.cat(gates, -1).cumsum(-1) >= 1.1
        step = reached.float().argmax(-1)
        step[~reached.any(-1)] = self.loops - 1
        chosen = torch.stack(states, 2).gather(2, step[..., None, None].expand(-1, -1, 1, x.shape[-1]))
        return {"logits": self.head(chosen.squeeze(2))}


MODELS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "ouro": (ouro, False),
    "ouro-mask": (ouro, True),
    "loopformer": (loopformer, False),
    "llama": (llama, False),
    "llama-mask": (llama, True),
    "llama-eager": (functools.partial(llama, "eager"), True),
    "parcae": (lambda: with_random_weights(Parcae(PARCAE)), False),
    "huginn": (lambda: with_random_weights(Huginn(HUGINN)), False),
    "nanbeige": (lambda: with_random_weights(Nanbeige(NANBEIGE)), False),
    "encoder-layer": (UniversalTransformer, False),
    "sliced": (SlicedPositions, False),
    "exits": (ExitByThreshold, False),
    "tiny": (TinyLoopedLM, False),
}
"""By name: the model, and whether it is captured with an attention mask."""


@functools.cache
def captured(name: str) -> tuple[nn.Module, lq.Program]:
    """A model with weights from a fixed seed, and its program, tagged and not quantized."""
    torch.manual_seed(0)
    make, masked = MODELS[name]
    model = make().eval()
    example: dict[str, Any] = {"input_ids": ids()}
    if masked:
        example["attention_mask"] = torch.ones_like(ids())
    graph_module = capture(model, example)
    TagLoops()(graph_module)
    graph_module.recompile()
    return model, lq.Program(graph_module)


@functools.cache
def quantized(scheme: str = "w4a8") -> lq.Program:
    """The tiny looped model in a scheme; shared, so do not change it."""
    return lq.compile(tiny_model(), ids(), scheme=scheme, method="symmetric")


def decode(
    run: Callable[..., dict[str, Tensor]],
    signature: Signature,
    tokens: Tensor,
    mask: Tensor,
    chunks: Sequence[int],
    loops: int = 3,
) -> Tensor:
    """Logits of all tokens, read `chunks` at a time through the cache."""
    sizes = {"batch": len(tokens), "past": 0, "loops": loops}
    past = {s.name: torch.zeros([sizes.get(d, d) for d in s.shape], dtype=s.dtype) for s in signature.inputs[2:]}
    logits, at = [], 0
    for length in chunks:
        result = run(input_ids=tokens[:, at : at + length], attention_mask=mask[:, : at + length], **past)
        past = {name: result[name.replace("past_key_values", "present")] for name in past}
        logits.append(result["logits"])
        at += length
    return torch.cat(logits, 1)


def check_decoding(
    model: Callable[..., Any], run: Callable[..., Any], signature: Signature, tolerance: float = 1e-5, loops: int = 3
) -> None:
    """Compares decoding in steps of several sizes with `model` on all tokens: full rows, and a row padded on the
    left."""
    tokens = ids()
    mask = torch.ones_like(tokens)
    with torch.no_grad():
        whole, alone = logits_of(model(tokens)), logits_of(model(tokens[1:, 4:]))
    given = decode(run, signature, tokens, mask, [5, 1, 1, 3], loops)
    scale = float(whole.abs().max())
    assert (given - whole).abs().max() < tolerance * scale
    mask[1, :4] = 0
    given = decode(run, signature, tokens, mask, [6, 1, 1, 2], loops)
    assert given.isfinite().all()
    assert (given[0] - whole[0]).abs().max() < tolerance * scale
    assert (given[1, 4:] - alone[0]).abs().max() < tolerance * scale
