"""The zoo: every way of looping that the compiler knows, with the structure it must find.

`python -m tests.zoo` prints the table in passes/README.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn
from torch.fx import traceback

from loopq_compile.capture.to_graph import capture
from loopq_compile.passes.loops.tag_loops import TagLoops
from loopq_compile.program import Program
from tests import zoo_models as m
from tests import zoo_more_models as more


@dataclass(frozen=True)
class Animal:
    """One model of the zoo and what is expected of it.

    Args:
        name: short name, also the test id.
        loops: how the model loops, for people.
        make: builds the model.
        structure: expected `program.loops.describe()`.
        count: expected `program.loops.count`.
        products: matrix products with a weight in each iteration of each top-level loop.
        fewer: how many of them a `(loop, iteration)` lacks.
    """

    name: str
    loops: str
    make: Callable[[], nn.Module]
    structure: str
    count: int
    products: tuple[int, ...]
    fewer: dict[tuple[int, int], int] = field(default_factory=dict)


def repeated_llama() -> nn.Module:
    """A Hugging Face Llama whose two layers are listed three times."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=m.VOCABULARY,
        hidden_size=m.DIM,
        intermediate_size=m.DIM,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    model.model.layers = nn.ModuleList([*model.model.layers] * 3)
    config.num_hidden_layers = 6
    return model


ZOO = {
    animal.name: animal
    for animal in (
        Animal("plain", "it does not", m.Plain, "no loop", 1, ()),
        Animal("once", "a block that runs once (T = 1)", m.Once, "no loop", 1, ()),
        Animal("albert", "one block, T times", m.Albert, "3 x (block)", 3, (2,)),
        Animal("tied", "the same, head tied to the embedding", m.Tied, "3 x (block)", 3, (2,)),
        Animal("stack", "a stack of layers, T times", m.Stack, "3 x (layers)", 3, (4,)),
        Animal("normed-stack", "stack and norm (Ouro without gate)", m.NormedStack, "3 x (layers, norm)", 3, (4,)),
        Animal("gated-stack", "stack, norm and exit gate (Ouro)", m.GatedStack, "3 x (layers, norm, gate)", 3, (5,)),
        Animal(
            "outer-norm", "stack and norm; the norm also runs behind the loop", m.OuterNorm, "3 x (layers)", 3, (4,)
        ),
        Animal("listed-twice", "modules listed at several positions", m.ListedTwice, "3 x (layers)", 3, (4,)),
        Animal("llama", "layers of a Hugging Face model listed thrice", repeated_llama, "3 x (model.layers)", 3, (14,)),
        Animal("rotary", "one attention; rotary tables in each call", more.Rotary, "3 x (attention)", 3, (2,)),
        Animal("rotary-once", "stack; rotary tables and mask in front", more.RotaryOnce, "3 x (layers)", 3, (4,)),
        Animal("padded", "stack with an attention mask", more.Padded, "3 x (layers)", 3, (4,)),
        Animal("gpt2", "GPT-2 layer (`Conv1D`)", more.Gpt2, "3 x (norm, c_attn, c_proj)", 3, (2,)),
        Animal(
            "time",
            "block modulated by loop time (LoopFormer)",
            m.TimeModulated,
            "3 x (times, time_mlp, block)",
            3,
            (2,),
        ),
        Animal("inject-add", "prelude, core, coda; `core(x + e)` (Parcae)", m.PreludeCoreCoda, "3 x (core)", 3, (2,)),
        Animal("inject-concat", "the same; `core(adapter([x, e]))`", m.InjectConcat, "3 x (adapter, core)", 3, (3,)),
        Animal("recurrent-depth", "the same from a constant state", m.RecurrentDepth, "3 x (adapter, core)", 3, (3,)),
        Animal("inject-later", "injection from the second loop on", m.InjectLater, "3 x (core)", 3, (2,)),
        Animal("zamba", "shared block between layers", m.SharedBetweenLayers, "3 x (shared)", 3, (2,)),
        Animal("two-shared", "two shared blocks between layers", m.AlternatingShared, "3 x (shared)", 3, (6,)),
        Animal("alternating", "two shared blocks in turn", m.Alternating, "3 x (shared)", 3, (4,)),
        Animal(
            "loop-adapters", "block, with an adapter per loop", more.LoopAdapters, "3 x (block, shared_out)", 3, (4,)
        ),
        Animal("loop-norms", "block, with a norm gain per loop", more.LoopNorms, "3 x (block)", 3, (2,)),
        Animal("skip", "loop t also reads the state of t - 2", more.SkipConnection, "4 x (block)", 4, (2,)),
        Animal(
            "transition",
            "a linear between iterations",
            more.Transition,
            "4 x (block, transition)",
            4,
            (3,),
            {(0, 0): 1},
        ),
        Animal("split", "two loops over one block, one after the other", more.SplitLoop, "3 x (block)", 3, (2,)),
        Animal("kept-tables", "tables computed in the first loop", more.TableInFirstLoop, "3 x (attention)", 3, (2,)),
        Animal("loop-gates", "stack, with an exit gate per loop behind it", more.LoopGates, "3 x (layers)", 3, (4,)),
        Animal("heads-behind", "the head reads all states behind the loop", more.HeadsBehind, "3 x (block)", 3, (2,)),
        Animal("one-forward", "injection without modules", more.FunctionalInjection, "3 x (w)", 3, (1,)),
        Animal(
            "supervised", "the head reads every loop's state", more.DeepSupervision, "3 x (block, lm_head)", 3, (3,)
        ),
        Animal(
            "nested-last",
            "layer, then a block twice; T times",
            lambda: m.Nested("last"),
            "3 x (outer.before, 2 x (outer.inner))",
            3,
            (6,),
        ),
        Animal(
            "nested-first",
            "a block twice, then a layer; T times",
            lambda: m.Nested("first"),
            "3 x (outer.after, 2 x (outer.inner))",
            3,
            (6,),
        ),
        Animal(
            "nested-middle",
            "layer, a block twice, layer; T times",
            lambda: m.Nested("middle"),
            "3 x (outer.before, outer.after, 2 x (outer.inner))",
            3,
            (8,),
        ),
        Animal(
            "nested-only",
            "a module that runs a block twice, T times",
            lambda: m.Nested("only"),
            "3 x (outer, 2 x (outer.inner))",
            3,
            (4,),
        ),
        Animal(
            "nested-twice",
            "a block thrice, layer, another block twice; T times",
            m.NestedTwice,
            "2 x (middle, 3 x (first), 2 x (second))",
            2,
            (12,),
        ),
        Animal("two-loops", "encoder thrice, decoder twice", m.TwoLoops, "3 x (encoder) + 2 x (decoder)", 3, (2, 2)),
        Animal(
            "functional",
            "weights without modules",
            more.Functional,
            "3 x (first, bias, second, third, fourth)",
            3,
            (4,),
        ),
        Animal("one-matrix", "`tanh(x @ w)`, T times", more.OneMatrix, "3 x (w)", 3, (1,)),
        Animal("siamese", "no loop: one encoder on two inputs", more.Siamese, "no loop", 1, ()),
        Animal("shared-qk", "no loop: q and k share a projection", more.SharedQueryKey, "no loop", 1, ()),
        Animal("looped-qk", "the same attention, T times", more.LoopedQueryKey, "3 x (qk, norm, v)", 3, (3,)),
    )
}


def example(model: nn.Module, batch: int = 2, length: int = 7) -> tuple[Tensor, ...]:
    """Inputs of a zoo model: token ids, and a mask where the model takes one."""
    generator = torch.Generator().manual_seed(batch + length)
    ids = torch.randint(0, m.VOCABULARY, (batch, length), generator=generator)
    if not isinstance(model, more.Padded):
        return (ids,)
    mask = torch.ones_like(ids)
    mask[0, length // 2 + 1 :] = 0
    return ids, mask


@functools.cache
def model_of(name: str) -> nn.Module:
    """The model called `name`, always with the same weights."""
    torch.manual_seed(0)
    return ZOO[name].make().eval()


@functools.cache
def tagged(name: str) -> Program:
    """The captured and tagged program of a zoo model; shared by tests, which must not change it."""
    model = model_of(name)
    with traceback.preserve_node_meta():
        graph_module = capture(model, None if name == "llama" else example(model))
    TagLoops()(graph_module)
    return Program(graph_module)


def meant(node: fx.Node) -> str | None:
    """The tag that the model's author marked `node` with, as `str(LoopTag)`; None outside of loops."""
    return (node.meta.get("custom") or {}).get(m.MARK) or None


def structure_table() -> str:
    """The Markdown table of expected structures."""
    rows = ["| name | how the model loops | structure |", "| --- | --- | --- |"]
    rows += [f"| {a.name} | {a.loops} | `{a.structure}` |" for a in ZOO.values()]
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(structure_table(), end="")
