"""Generation options, on small functions and on a program."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from loopq_compile.errors import LoopQError
from loopq_compile.generation import generate, logits_of, stream
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


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}])
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
        (PROMPT, {"do_sample": True, "temperature": 0.0}, "do_sample=False"),
        (PROMPT, {"do_sample": True, "top_k": 0}, "top_k"),
        (PROMPT, {"do_sample": True, "top_p": 1.5}, "top_p"),
    ],
)
def test_bad_options(ids: Tensor, options: dict[str, float], message: str) -> None:
    with pytest.raises(LoopQError, match=message):
        generate(model, ids, **options)
