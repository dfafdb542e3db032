"""Speculation: the text is that of plain decoding, whatever is proposed; what is counted and refused."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from loopq_compile.errors import LoopQError
from loopq_compile.generation.expectation import Cost, Experience, best_length
from loopq_compile.generation.lookup import Repeats
from loopq_compile.generation.sampling import generate, stream
from loopq_compile.generation.speculation import Speculation
from tests.decoding import captured, ids, quantized

PROMPT = torch.cat([ids(1, 6), ids(1, 6), ids(1, 3)], 1)


@pytest.mark.parametrize("method", ["lookup", "loops:1", "loops:2", "auto"])
@pytest.mark.parametrize("name", ["ouro", "parcae"])
def test_greedy_text_is_that_of_plain_decoding(name: str, method: str) -> None:
    program, speculation = captured(name)[1], Speculation(method)
    for prompt in (PROMPT, PROMPT[:, :1], PROMPT.roll(2, 1)):
        found = program.generate(prompt, 24, speculate=speculation)
        assert torch.equal(found, program.generate(prompt, 24))
        assert speculation.tokens == 23, "the first token is that of the prompt"
        assert 0 <= speculation.accepted <= speculation.proposed


@pytest.mark.parametrize("method", ["lookup", "loops", "auto"])
@pytest.mark.parametrize("bits", [None, 8])
def test_rounded_activations_and_caches(bits: int | None, method: str) -> None:
    program = quantized().with_cache(kv_bits=bits)
    for seed in range(3):
        prompt = ids(1, 9, seed).repeat(1, 2)
        assert torch.equal(program.generate(prompt, 20, speculate=method), program.generate(prompt, 20))


@pytest.mark.parametrize("method", ["lookup", "loops", "auto"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 12}, {"top_p": 0.8}])
def test_the_seed_draws_what_it_draws_plainly(method: str, options: dict[str, Any]) -> None:
    program = captured("ouro")[1]
    for seed in range(3):
        given: dict[str, Any] = {"do_sample": True, "seed": seed, **options}
        assert torch.equal(
            program.generate(PROMPT, 16, speculate=method, **given), program.generate(PROMPT, 16, **given)
        )


VOCABULARY, LENGTH = 4, 3
TABLE = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(2))
DRAFT = TABLE + torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(3))


class Markov:
    """A text whose next token depends on the last one only; its first loops believe in another table."""

    first_loops = 1

    def __init__(self) -> None:
        self.experience, self.pending = Experience(), list[int]()

    def text_reader(self, speculation: Speculation) -> Markov:
        return self

    def start(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return TABLE[tokens[:, -1]]

    def read(self, tokens: list[int]) -> Tensor:
        return TABLE[tokens]

    def keep(self, count: int) -> None:
        pass

    def propose(self, token: int) -> Tensor:
        self.pending.append(token)
        return DRAFT[[token]]

    def verify(self) -> Tensor:
        tokens, self.pending = self.pending, []
        return TABLE[tokens]


@pytest.mark.parametrize("method", ["lookup", "loops"])
def test_the_distribution_is_exact(method: str) -> None:
    """Chi-squared over all texts of three tokens: 63 degrees of freedom, 99.99 % quantile 113."""
    prompt, runs, model = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0]]), 4000, Markov()
    counts = Counter(
        tuple(generate(model, prompt, LENGTH, do_sample=True, seed=seed, speculate=method)[0, -LENGTH:].tolist())
        for seed in range(runs)
    )
    chances, total = TABLE.softmax(-1), 0.0
    for text in torch.cartesian_prod(*[torch.arange(VOCABULARY)] * LENGTH).tolist():
        expected = runs * float(torch.stack([chances[a, b] for a, b in zip([0, *text], text, strict=False)]).prod())
        total += (counts[tuple(text)] - expected) ** 2 / expected
    assert total < 113
    assert len(counts) > 32


def test_proposals_are_accepted_and_refused_in_that_test() -> None:
    speculation = Speculation("loops")
    generate(Markov(), torch.tensor([[0]]), 400, do_sample=True, speculate=speculation)
    assert 0.2 < speculation.acceptance < 0.95


@pytest.mark.parametrize("method", ["lookup", "loops", "auto"])
def test_text_ends_at_its_end(method: str) -> None:
    program = captured("ouro")[1]
    plain = program.generate(PROMPT, 24)[0, PROMPT.shape[1] :].tolist()
    end = plain[7]
    expected = plain[: plain.index(end) + 1]
    found = [int(token) for token in stream(program, PROMPT, 24, eos_token_id=[end], speculate=method)]
    assert found == expected


def test_repetitions_take_few_steps() -> None:
    speculation = Speculation("lookup")
    program = captured("ouro")[1]
    program.generate(PROMPT, 40, speculate=speculation)  # its greedy text soon repeats itself
    assert speculation.tokens_per_step > 2
    assert f"{speculation.tokens_per_step:.2f} a step" in str(speculation)
    assert speculation.to_dict()["accepted"] == speculation.accepted > 0


def test_padding_on_the_left() -> None:
    program = captured("ouro")[1]
    padded, mask = torch.cat([PROMPT[:, :2] * 0, PROMPT], 1), torch.ones(1, 17, dtype=torch.int64)
    mask[:, :2] = 0
    expected = program.generate(padded, 12, attention_mask=mask)
    for method in ("lookup", "loops"):
        assert torch.equal(program.generate(padded, 12, attention_mask=mask, speculate=method), expected)


def test_what_is_refused() -> None:
    program = captured("ouro")[1]
    with pytest.raises(LoopQError, match="2 rows"):
        program.generate(ids(2, 4), 4, speculate="lookup")
    with pytest.raises(LoopQError, match="Early exit and speculation"):
        program.generate(PROMPT, 4, speculate="lookup", exit_threshold=0.5)
    with pytest.raises(LoopQError, match="choose 1 to 2"):
        program.generate(PROMPT, 4, speculate="loops:3")
    with pytest.raises(LoopQError, match="Unknown way to speculate"):
        program.generate(PROMPT, 4, speculate="lookups")
    with pytest.raises(LoopQError, match="K is the number"):
        program.generate(PROMPT, 4, speculate="loops:x")
    with pytest.raises(LoopQError, match="this is a model"):
        generate(lambda tokens: tokens, PROMPT, 4, speculate="lookup")
    with pytest.raises(LoopQError, match="only the last token"):
        program.with_cache(last_token=True).generate(PROMPT.repeat(1, 2), 20, speculate="lookup")


def test_auto_without_loops_is_lookup() -> None:
    speculation = Speculation("auto")
    program = captured("ouro")[1].with_cache(stacked=True)
    assert torch.equal(program.generate(PROMPT, 12, speculate=speculation), program.generate(PROMPT, 12))
    assert "stacked" in speculation.notes[0] and "loops" not in speculation.counts


def test_repeats() -> None:
    text = Repeats([1, 2, 3, 9, 2, 3, 7, 2, 3])
    assert text.propose(4) == ([7, 2, 3, 7], 2), "the latest place, and on into what was proposed"
    text.append(9)
    assert text.propose(2) == ([2, 3], 3)
    assert Repeats([1, 2, 3]).propose(5) == ([], 0)


def test_as_many_tokens_are_read_as_pay() -> None:
    cost = Cost()
    for width, seconds in ((1, 1.0), (5, 1.4)):
        cost.add(width, seconds)
    assert cost.of(3) == pytest.approx(1.2)
    assert best_length([0.9] * 8, cost.of)[0] == 8
    assert best_length([0.9, 0.01, 0.9], cost.of)[0] == 1
    assert best_length([0.02] * 3, cost.of) == (0, 1.0)
