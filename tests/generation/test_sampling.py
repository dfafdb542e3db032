"""Generation options, on small functions and on a program."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from loopq_compile.errors import LoopQError
from loopq_compile.generation.decoders import CachedDecoder
from loopq_compile.generation.sampling import generate, stream
from loopq_compile.graph.state import copy_graph
from loopq_compile.graph.texts import logits_of
from loopq_compile.program import Program
from tests.backends.onnx import graphs
from tests.decoding import captured
from tests.tiny import VOCABULARY, tiny_program, tokens

TABLE = 3 * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(1))
PROMPT = tokens(3, batch=2, length=5)


def model(ids: Tensor) -> Tensor:
    return TABLE[ids].cumsum(1) / 2


def test_greedy_equals_recomputation_with_a_program() -> None:
    program, ids = tiny_program(), tokens(7, batch=2, length=6)
    made = program.generate(ids, max_new_tokens=5)
    for _ in range(5):
        ids = torch.cat([ids, program(ids)["logits"][:, -1:].argmax(-1)], 1)
    assert torch.equal(made, ids)


def test_one_token_prompts_and_streams() -> None:
    ids = tokens(1, batch=1, length=1)
    made = generate(model, ids, 4)
    assert made.shape == (1, 5)
    assert [int(token[0]) for token in stream(model, ids, 4)] == made[0, 1:].tolist()


def test_the_seed_decides_what_is_drawn() -> None:
    first, same, other = (generate(model, PROMPT, 12, do_sample=True, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_sampling_leaves_the_global_random_state_alone() -> None:
    state = torch.get_rng_state()
    generate(model, PROMPT, 3, do_sample=True)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "options", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}, {"temperature": 1e-40}, {"temperature": 5e-324}]
)
def test_narrow_sampling_is_greedy(options: dict[str, float]) -> None:
    sampled = generate(model, PROMPT, 8, do_sample=True, **options)
    assert torch.equal(sampled, generate(model, PROMPT, 8))


def test_wide_sampling_is_plain_sampling() -> None:
    plain = generate(model, PROMPT, 8, do_sample=True)
    assert torch.equal(plain, generate(model, PROMPT, 8, do_sample=True, top_k=VOCABULARY, top_p=1.0, temperature=1.0))


def test_top_k_and_top_p_draw_from_the_most_likely_tokens() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))

    def fixed(ids: Tensor) -> Tensor:
        return logits.expand(*ids.shape, 4)

    ids = torch.zeros(1, 1, dtype=torch.int64)
    assert set(generate(fixed, ids, 200, do_sample=True)[0].tolist()) == {0, 1, 2, 3}
    assert set(generate(fixed, ids, 200, do_sample=True, top_k=2)[0].tolist()) == {0, 1}
    assert set(generate(fixed, ids, 200, do_sample=True, top_p=0.7)[0].tolist()) == {0, 1}
    assert set(generate(fixed, ids, 200, do_sample=True, top_p=0.85)[0].tolist()) == {0, 1, 2}


def test_generation_stops_when_all_sequences_have_ended() -> None:
    def counting(ids: Tensor) -> Tensor:
        return torch.nn.functional.one_hot((ids + 1) % 8, 8).float()

    ids = torch.tensor([[1], [3]])
    made = generate(counting, ids, 20, eos_token_id=5)
    assert made.tolist() == [[1, 2, 3, 4, 5], [3, 4, 5, 5, 5]]


def test_logits_are_found_in_every_kind_of_output() -> None:
    logits = torch.zeros(1, 2, 3)
    for output in (logits, (logits, None), [logits], {"logits": logits}, SimpleNamespace(logits=logits)):
        assert logits_of(output) is logits
    for output in (None, {}, (), torch.zeros(2, 3), "text"):
        with pytest.raises(LoopQError, match="logits"):
            logits_of(output)


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (PROMPT[0], {}, r"\[batch, sequence\]"),
        (PROMPT.float(), {}, "integer"),
        ([1, 2], {}, "list"),
        (PROMPT[:, :0], {}, "empty"),
        (PROMPT, {"max_new_tokens": 0}, "max_new_tokens"),
        (PROMPT, {"do_sample": True, "temperature": 0.0}, "leave out do_sample"),
        (PROMPT, {"do_sample": True, "top_k": 0}, "top_k"),
        (PROMPT, {"do_sample": True, "top_p": 1.5}, "top_p"),
        (PROMPT, {"do_sample": True, "top_p": float("nan")}, "top_p"),
        (PROMPT, {"do_sample": True, "temperature": float("nan")}, "temperature"),
        (PROMPT, {"do_sample": True, "temperature": float("inf")}, "temperature"),
        (PROMPT, {"do_sample": True, "temperature": torch.ones(2)}, "temperature must be a number"),
        (PROMPT, {"top_k": 2.5}, "top_k must be a whole number"),
        (PROMPT, {"seed": 10**20}, "seed must be at most"),
        (PROMPT, {"max_new_tokens": 1.5}, "max_new_tokens must be a whole number"),
        (PROMPT, {"max_new_tokens": True}, "max_new_tokens must be a whole number"),
        (PROMPT, {"eos_token_id": "5"}, "eos_token_id must be a whole number"),
        (PROMPT, {"eos_token_id": 10**20}, "eos_token_id must be at most"),
    ],
)
def test_bad_options(ids: Tensor, options: dict[str, float], message: str) -> None:
    with pytest.raises(LoopQError, match=message):
        generate(model, ids, **options)


def test_scalars_of_numpy_and_pytorch_are_numbers() -> None:
    plain = {"do_sample": True, "temperature": 2.0, "top_k": 5, "top_p": 0.75, "seed": 3, "eos_token_id": 4}
    expected = generate(model, PROMPT, 8, **plain)  # type: ignore[arg-type]
    arrays = {"temperature": np.float32(2), "top_k": np.int64(5), "top_p": np.float64(0.75), "seed": np.uint8(3)}
    tensors = {name: torch.tensor(value) for name, value in plain.items() if name != "do_sample"}
    ends = ({"eos_token_id": end} for end in (np.int32(4), np.array([4]), torch.tensor([4]), (4,), {4}, 4.0))
    for given in (arrays, tensors, {"top_k": 5.0}, *ends):
        assert torch.equal(generate(model, PROMPT, 8, **(plain | given)), expected)  # type: ignore[arg-type]
    assert torch.equal(generate(model, PROMPT, np.int64(8), **plain), expected)  # type: ignore[arg-type]
    for seed in (-1, 2**63, 2**64 - 1):
        assert generate(model, PROMPT, 2, do_sample=True, seed=seed, temperature=1e38).shape == (2, 7)


def test_threads_that_begin_at_once_generate_alike() -> None:
    program, start = Program(copy_graph(tiny_program().graph_module)), threading.Barrier(8)

    def work(_: int) -> Tensor:
        start.wait()
        return program.generate(PROMPT, 5)

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(work, range(8)))
    assert all(torch.equal(one, tiny_program().generate(PROMPT, 5)) for one in made)


def test_several_tokens_end_a_sequence() -> None:
    def counting(ids: Tensor) -> Tensor:
        return torch.nn.functional.one_hot((ids + 1) % 8, 8).float()

    made = generate(counting, torch.tensor([[1], [4]]), 20, eos_token_id=[5, 3])
    assert made.tolist() == [[1, 2, 3], [4, 5, 5]]


def test_a_program_reads_its_prompt_once() -> None:
    program = tiny_program()
    decoder = program.decoder()
    assert isinstance(decoder, CachedDecoder)
    ids = tokens(2, batch=2, length=6)
    first = decoder(ids, torch.ones_like(ids))
    second = decoder(ids[:, :1], torch.ones(2, 7, dtype=torch.int64))
    whole = program(torch.cat([ids, ids[:, :1]], 1))["logits"]
    torch.testing.assert_close(first, whole[:, -2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(second, whole[:, -1], rtol=1e-4, atol=1e-4)


def test_rows_padded_on_the_left_say_what_they_say_alone() -> None:
    _, program = captured("loopformer")
    ids = tokens(4, batch=2, length=9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    together = program.generate(ids, 6, attention_mask=mask)
    assert torch.equal(together[:1], program.generate(ids[:1], 6))
    assert torch.equal(together[1:, 4:], program.generate(ids[1:, 4:], 6))


def test_a_program_that_cannot_have_a_cache_recomputes() -> None:
    program = Program(graphs.captured(graphs.Recurrent()))
    ids = graphs.tokens(2, 5)
    made = program.generate(ids, 3)
    for _ in range(3):
        ids = torch.cat([ids, program(ids)[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, ids)
    with pytest.raises(LoopQError, match="cannot be padded"):
        program.generate(ids, 3, attention_mask=torch.tensor([[0, *[1] * 7], [1] * 8]))


def test_a_changed_program_gets_another_cache() -> None:
    program = Program(copy_graph(captured("tiny")[1].graph_module))
    ids = tokens(5, batch=1, length=4)
    before = program.generate(ids, 1)
    head = program.graph_module.get_submodule("head")
    head.weight = torch.nn.Parameter(-head.weight.detach(), requires_grad=False)
    expected = torch.cat([ids, program(ids)["logits"][:, -1:].argmax(-1)], 1)
    after = program.generate(ids, 1)
    assert torch.equal(after, expected)
    assert not torch.equal(after, before)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 4, dtype=torch.int64), r"the shape of input_ids, \[2, 5\]; got \[2, 4\]"),
        (torch.tensor([[1] * 5, [1, 1, 1, 0, 0]]), "on the left"),
        ("none", "got str"),
    ],
)
def test_bad_masks(mask: object, message: str) -> None:
    with pytest.raises(LoopQError, match=message):
        tiny_program().generate(PROMPT, 1, attention_mask=mask)  # type: ignore[arg-type]
