"""Random looped models: captured exactly, and tagged as their author meant."""

from dataclasses import dataclass

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import traceback
from torch.nn import functional as F

from loopq_compile.capture.to_graph import capture
from loopq_compile.graph.loops import get_tag
from loopq_compile.graph.verify import verify_tags
from loopq_compile.passes.loops.tag_loops import TagLoops
from loopq_compile.program import Program
from tests.cases import cases
from tests.zoo import meant
from tests.zoo_models import DIM, VOCABULARY, loop


@dataclass(frozen=True)
class Plan:
    """How a random model is built."""

    loops: int
    layers: int
    inner: int
    prelude: int
    coda: int
    bias: bool
    gated: bool
    tied: bool
    normed: bool
    inject: bool
    attention: str
    sandwich: bool


HEADS = {"": (0, 0), "single": (1, 1), "many": (4, 4), "grouped": (4, 2), "shared key": (4, 1), "fused": (4, 2)}
"""Query heads and key-value heads by kind of attention."""


class Attention(nn.Module):
    """Causal attention, with one projection or three."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.heads, self.pairs = HEADS[plan.attention]
        self.size = DIM // self.heads
        parts = [self.heads * self.size, self.pairs * self.size, self.pairs * self.size]
        self.parts = [sum(parts)] if plan.attention == "fused" else parts
        self.into = nn.ModuleList([nn.Linear(DIM, width, bias=plan.bias) for width in self.parts])
        self.out = nn.Linear(DIM, DIM, bias=plan.bias)

    def forward(self, x: Tensor) -> Tensor:
        whole = torch.cat([layer(x) for layer in self.into], -1)
        batch, length, _ = x.shape
        heads = whole.view(batch, length, self.heads + 2 * self.pairs, self.size).transpose(1, 2)
        q, k, v = heads.split([self.heads, self.pairs, self.pairs], 1)
        k, v = (y.repeat_interleave(self.heads // self.pairs, 1) for y in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, length, DIM))


class Layer(nn.Module):
    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.attention = Attention(plan) if plan.attention else None
        self.before = nn.RMSNorm(DIM) if plan.attention else None
        self.after = nn.RMSNorm(DIM) if plan.sandwich else None
        self.norm = nn.RMSNorm(DIM)
        self.gate = nn.Linear(DIM, DIM, bias=plan.bias) if plan.gated else None
        self.up, self.down = nn.Linear(DIM, DIM, bias=plan.bias), nn.Linear(DIM, DIM, bias=plan.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.attention is not None and self.before is not None:
            x = x + self.attention(self.before(x))
        y = self.norm(x)
        up = self.up(y) if self.gate is None else F.silu(self.gate(y)) * self.up(y)
        down = self.down(F.silu(up))
        return x + (down if self.after is None else self.after(down))


class Random(nn.Module):
    def __init__(self, plan: Plan) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.plan = plan
        self.embed, self.lm_head = nn.Embedding(VOCABULARY, DIM), nn.Linear(DIM, VOCABULARY, bias=False)
        if plan.tied:
            self.lm_head.weight = self.embed.weight
        for name in ("prelude", "layers", "coda"):
            self.add_module(name, nn.ModuleList([Layer(plan) for _ in range(getattr(plan, name))]))
        self.inner, self.norm, self.last = Layer(plan), nn.RMSNorm(DIM), nn.RMSNorm(DIM)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.prelude:
            x = layer(x)
        e = x
        for t in range(self.plan.loops):
            with loop(t):
                x = x + 0.5 * e if self.plan.inject else x
                for layer in self.layers:
                    x = layer(x)
            for k in range(self.plan.inner):
                with loop(t, k) if self.plan.inner > 1 else loop(t):
                    x = self.inner(x)
            with loop(t):
                x = self.norm(x) if self.plan.normed else x
        for layer in self.coda:
            x = layer(x)
        return self.lm_head(self.last(x))


plans = st.builds(
    Plan,
    loops=st.integers(2, 3),
    layers=st.integers(1, 2),
    inner=st.integers(0, 2),
    prelude=st.integers(0, 1),
    coda=st.integers(0, 1),
    bias=st.booleans(),
    gated=st.booleans(),
    tied=st.booleans(),
    normed=st.booleans(),
    inject=st.booleans(),
    attention=st.sampled_from(list(HEADS)),
    sandwich=st.booleans(),
)


def structure(plan: Plan) -> str:
    blocks = ["layers"] + ["inner"] * (plan.inner == 1) + ["norm"] * plan.normed + ["2 x (inner)"] * (plan.inner == 2)
    return f"{plan.loops} x ({', '.join(blocks)})"


@cases(6)
@given(plans)
def test_random_models_are_captured_and_tagged(plan):
    model = Random(plan).eval()
    with traceback.preserve_node_meta():
        graph_module = capture(model, torch.zeros(2, 3, dtype=torch.int64))
    TagLoops()(graph_module)
    verify_tags(graph_module)
    program = Program(graph_module)
    assert program.loops.describe() == structure(plan)
    for node in graph_module.graph.nodes:
        if node.op == "call_function":
            assert (str(get_tag(node)) if get_tag(node) else None) == meant(node), node.name
    for size in ((2, 3), (1, 1), (3, 5)):
        ids = torch.randint(0, VOCABULARY, size)
        torch.testing.assert_close(program(ids), model(ids), rtol=1e-5, atol=1e-5)
