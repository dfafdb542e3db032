"""`add-cache`: decoding with a cache equals reading everything again, on models of several shapes; what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import loopq_compile as lq
from loopq_compile.capture.to_graph import capture
from loopq_compile.evaluation.perplexity import logits_caller
from loopq_compile.generation.sampling import generate
from loopq_compile.graph.loops import LoopTag, set_tag
from loopq_compile.graph.state import get_state
from loopq_compile.passes.cache.add_cache import AddCache
from loopq_compile.passes.cache.cache_slots import Pair, find_slots
from loopq_compile.passes.loops.tag_loops import TagLoops
from loopq_compile.pipeline import Pipeline
from loopq_compile.program import Program
from tests.backends.onnx.graphs import Recurrent
from tests.decoding import MODELS, SlicedPositions, captured, check_decoding, decode, ids, left_padded, quantized
from tests.token_models import GOOD, Model, marked_keys, places, scaled_queries, turned_values


@pytest.mark.parametrize(
    ("name", "stacked"), [*((name, False) for name in MODELS), ("ouro", True), ("llama-mask", True), ("sliced", True)]
)
def test_decoding_equals_recomputation(name: str, stacked: bool) -> None:
    model, program = captured(name)
    cached = program.with_cache(stacked=stacked)
    loops = 2 if name.startswith(("llama", "sliced", "nanbeige")) else 3
    check_decoding(model, cached, get_state(cached.graph_module).signature, loops=loops)


@pytest.mark.parametrize("name", ["ouro", "loopformer", "parcae", "huginn", "nanbeige", "encoder-layer"])
def test_hugging_faces_generate(name: str) -> None:
    """The cache adds a mask if the model has none; a padded row 1 gives the same as that row by itself."""
    program, given = captured(name)[1], left_padded()
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = program.as_hugging_face().generate(**given, **options)
    assert torch.equal(found, program.generate(given["input_ids"], 5, attention_mask=given["attention_mask"]))
    assert torch.equal(found[1:, 3:], program.generate(given["input_ids"][1:, 3:], 5))


def test_a_quantized_program() -> None:
    program = quantized()
    cached = program.with_cache()
    check_decoding(program, cached, get_state(cached.graph_module).signature, tolerance=1e-4)


def test_one_cache_for_every_loop_and_layer_or_stacked_by_loop() -> None:
    _, program = captured("llama-mask")  # layers 0, 1 twice, 2: grouped queries are cached before they are repeated
    inputs = [str(spec) for spec in get_state(program.with_cache().graph_module).signature.inputs]
    assert inputs[:3] == [
        "input_ids: int64[batch, sequence]",
        "attention_mask: int64[batch, past + sequence]",
        "past_key_values.0.key: float32[batch, 2, past, 8]",
    ]
    assert len(inputs) == 2 + 2 * 4
    stacked = [str(spec) for spec in get_state(program.with_cache(stacked=True).graph_module).signature.inputs]
    assert stacked[4] == "past_key_values.1.key: float32[loops, batch, 2, past, 8]"
    assert stacked[2] == inputs[2] and len(stacked) == 2 + 2 * 3


@pytest.mark.parametrize("name", ["ouro", "llama", "loopformer"])
def test_a_step_costs_no_square_of_the_context(name: str) -> None:
    """Values computed from positions are cut to the new tokens at their source."""
    _, program = captured(name)
    cached = program.with_cache()
    limit = ["sequence + past, sequence + past", "past + sequence, past + sequence"]
    squares = [line for line in str(cached).splitlines() if any(square in line for square in limit)]
    assert squares == []


@pytest.mark.parametrize(("name", "counts"), [("ouro", False), ("loopformer", True)])
def test_only_absolute_positions_are_counted_from_the_mask(name: str, counts: bool) -> None:
    """For rotary tables only distances matter, so they stay as the model computes them."""
    assert ("cumsum" in str(captured(name)[1].with_cache())) == counts


def test_computed_positions_count_real_tokens() -> None:
    model = Model(scaled_queries, marked_keys, turned_values, step=places).eval()
    cached = lq.Program(capture(model, ids())).with_cache()
    check_decoding(model, cached, get_state(cached.graph_module).signature)


def test_logits_of_the_last_token_alone() -> None:
    model, program = captured("ouro")
    cached = program.with_cache(last_token=True)
    signature = get_state(cached.graph_module).signature
    tokens = ids()
    given = decode(cached, signature, tokens, torch.ones_like(tokens), [7, 1, 2])
    with torch.no_grad():
        torch.testing.assert_close(given, model(tokens).logits[:, [6, 7, 9]])


def test_a_model_that_gives_the_last_tokens_logits_only() -> None:
    """`[batch, vocabulary]`: enough to generate, with a cache and without, but not to score a text."""
    model = Model(end=lambda logits: logits[:, -1]).eval()
    program, tokens = lq.Program(capture(model, ids())), ids()
    assert program.cached() is not None
    found = program.generate(tokens, 3)
    assert found.equal(generate(model, tokens, 3)) and found.shape == (2, 13)
    with pytest.raises(lq.LoopQError, match="of one token of each row"):
        logits_caller(program)(tokens)


def test_a_second_run_changes_nothing_and_the_program_stays() -> None:
    _, program = captured("tiny")
    before = str(program)
    cached = program.with_cache()
    assert str(program) == before
    assert not AddCache()(cached.graph_module).modified


def test_saved_and_loaded(tmp_path) -> None:
    _, program = captured("ouro-mask")
    cached = program.with_cache()
    cached.save(tmp_path)
    loaded = lq.load(tmp_path)
    tokens = ids()
    signature = get_state(loaded.graph_module).signature
    a, b = (decode(p, signature, tokens, torch.ones_like(tokens), [4, 6]) for p in (cached, loaded))
    assert torch.equal(a, b)


def test_caches_are_real_where_rotary_embeddings_are_complex() -> None:
    """Three ways of attention in three loops; one passes through complex numbers, one merges rows and heads."""
    program = Program(Pipeline([TagLoops()]).run(capture(GOOD["products"](), ids(2, 11))))
    for stacked in (False, True):
        specs = get_state(program.with_cache(stacked=stacked).graph_module).signature.inputs[2:]
        assert {spec.dtype for spec in specs} == {torch.float32}
        assert len(specs) == (2 if stacked else 6)


@pytest.mark.parametrize(("last", "caches"), [((2, 4, 8, 16), 1), ((2, 2, 8, 16), 3)])
def test_iterations_share_a_cache_where_their_shapes_agree(last: tuple[int, ...], caches: int) -> None:
    graph, pairs = fx.Graph(), []
    for iteration, shape in enumerate([(2, 4, 8, 16), (2, 4, 8, 16), last]):
        nodes = [graph.placeholder(f"{name}{iteration}") for name in ("key", "value")]
        for node in nodes:
            node.meta["val"] = torch.empty(shape)
            set_tag(node, LoopTag((0,), (iteration,)))
        pairs.append(Pair(*nodes))
    assert len(find_slots(pairs, [3], stacked=True)) == caches


def test_sizes_that_disagree() -> None:
    _, program = captured("tiny")
    cached = program.with_cache()
    past = {s.name: torch.zeros(2, 2, 3, 16) for s in get_state(cached.graph_module).signature.inputs[2:]}
    with pytest.raises(lq.LoopQError, match=r"'past \+ sequence' = 4, the other inputs make it 3 \+ 5"):
        cached(input_ids=ids(2, 5), attention_mask=torch.ones(2, 4, dtype=torch.int64), **past)


class Mixing(nn.Module):
    """Causal attention, and something else."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.embed, self.linear = kind, nn.Embedding(64, 16), nn.Linear(16, 16)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        q = self.linear(x).unsqueeze(1)
        x = x + F.scaled_dot_product_attention(q, q, q, is_causal=self.kind != "bidirectional").squeeze(1)
        if self.kind == "running sum":
            x = x.cumsum(1)
        if self.kind == "mean":
            x = x - x.mean((0, 1))
        if self.kind == "length":
            x = x / (torch.arange(input_ids.shape[1]) + 1).sum()
        if self.kind == "fixed mix":
            x = torch.ones(input_ids.shape[1], input_ids.shape[1]).tril() @ x
        return x @ self.embed.weight.t()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Recurrent(), "no attention"),
        (Mixing("bidirectional"), "lets tokens see later ones"),
        (SlicedPositions(visible=1), "lets tokens see later ones"),
        (Mixing("running sum"), r"cumsum.*works along the sequence"),
        (Mixing("mean"), r"mean.*works along the sequence"),
        (Mixing("length"), "depends on the length of the text"),
        (Mixing("fixed mix"), "multiplies two tensors that run over the sequence"),
    ],
)
def test_what_cannot_be_cached(model: nn.Module, message: str) -> None:
    program = lq.Program(capture(model.eval(), ids()))
    with pytest.raises(lq.LoopQError, match=message):
        program.with_cache()


def test_refusals_name_the_source_line() -> None:
    program = lq.Program(capture(Mixing("running sum").eval(), ids()))
    with pytest.raises(lq.LoopQError, match=r"x = x\.cumsum\(1\)"):
        program.with_cache()


def test_inputs_beyond_tokens_and_mask_are_refused() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Mixing("none")

        def forward(self, input_ids: Tensor, factor: Tensor) -> Tensor:
            return self.inner(input_ids) * factor

    program = lq.Program(capture(Scaled().eval(), (ids(), torch.ones(1))))
    with pytest.raises(lq.LoopQError, match="factor"):
        program.with_cache()
