"""Perplexity by sliding window, against independent formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from torch.nn import functional as F

from loopq_compile.errors import LoopQError
from loopq_compile.evaluation.perplexity import Remembered, evaluate, windows
from loopq_compile.generation.tokenizer import tokenize
from tests.tiny import VOCABULARY, tiny_model, tiny_program, tokens

TEXT = torch.randint(0, VOCABULARY, (211,), generator=torch.Generator().manual_seed(5))
TABLE = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(6))


def uniform(ids: Tensor) -> Tensor:
    return torch.zeros(*ids.shape, VOCABULARY)


def contextual(ids: Tensor) -> Tensor:
    """Logits that depend on all tokens of the window so far."""
    return TABLE[ids].cumsum(1)


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    score = evaluate(uniform, TEXT, length=32, stride=16)
    assert score.perplexity == pytest.approx(VOCABULARY, rel=1e-6)
    assert score.tokens == len(TEXT) - 1
    assert score.kl is None and score.agreement is None


def test_without_overlap_it_is_the_cross_entropy_of_disjoint_windows() -> None:
    ids = TEXT[:192].view(6, 32)
    plain = F.cross_entropy(contextual(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    score = evaluate(contextual, TEXT[:192], length=32, stride=32)
    assert score.nll == pytest.approx(float(plain), rel=1e-6)
    assert score.tokens == 6 * 31


def test_with_overlap_every_token_is_scored_once_in_the_first_window_that_holds_it() -> None:
    length, stride = 32, 12
    losses = {}
    for begin in range(0, len(TEXT), stride):
        window = TEXT[begin : begin + length]
        logp = contextual(window.unsqueeze(0))[0].log_softmax(-1)
        for i in range(1, len(window)):
            losses.setdefault(begin + i, -float(logp[i - 1, window[i]]))
    assert sorted(losses) == list(range(1, len(TEXT)))
    score = evaluate(contextual, TEXT, length=length, stride=stride)
    assert score.nll == pytest.approx(sum(losses.values()) / len(losses), rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 300), st.integers(2, 64), st.data())
def test_windows_cover_the_text(count: int, length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, length - 1))
    found = windows(count, length, stride)
    scored = [w.begin + i for w in found for i in range(w.first, w.end - w.begin)]
    assert scored == list(range(1, count))
    assert all(0 <= w.begin < w.end <= count and w.end - w.begin <= length for w in found)


def test_results_do_not_depend_on_the_batch_and_repeat_exactly() -> None:
    model = tiny_model()
    one = evaluate(model, TEXT, length=32, stride=16, batch=1)
    many = evaluate(model, TEXT, length=32, stride=16, batch=7)
    again = evaluate(model, TEXT, length=32, stride=16, batch=7)
    assert one.nll == pytest.approx(many.nll, rel=1e-5)
    assert many.nll == again.nll


def test_a_model_is_at_distance_zero_from_itself() -> None:
    score = evaluate(contextual, TEXT, teacher=contextual, length=32, stride=16)
    assert score.kl == pytest.approx(0, abs=1e-6)
    assert score.agreement == 1


def test_kl_divergence_and_agreement_by_hand() -> None:
    score = evaluate(uniform, TEXT[:20], teacher=contextual, length=20, stride=20)
    p = contextual(TEXT[None, :20])[0, :-1].double().softmax(-1)
    assert score.kl == pytest.approx(float((p * (p.log() + math.log(VOCABULARY))).sum(-1).mean()), rel=1e-5)
    assert score.agreement == pytest.approx(float((p.argmax(-1) == 0).double().mean()))


def test_a_program_scores_close_to_its_model() -> None:
    program = tiny_program("w8a8", "las", "dynamic")
    score = evaluate(program, TEXT, teacher=tiny_model(), length=32, stride=16)
    assert 0 < score.kl < 1e-2
    assert score.perplexity == pytest.approx(evaluate(tiny_model(), TEXT, length=32, stride=16).perplexity, rel=0.02)


def test_remembered_asks_the_model_once_per_window() -> None:
    asked = []

    def model(ids: Tensor) -> Tensor:
        asked.append(ids)
        return uniform(ids)

    remembered = Remembered(model)
    first = remembered(tokens())
    assert remembered(tokens()) is first and len(asked) == 1
    remembered(tokens(1))
    assert len(asked) == 2
    small = Remembered(model, limit=1)
    small(tokens()), small(tokens()), small(tokens(1))
    assert len(small._kept) == 1


def test_infinite_loss_becomes_null_in_json() -> None:
    def certain(ids: Tensor) -> Tensor:
        return torch.full((*ids.shape, VOCABULARY), -torch.inf).index_fill(-1, torch.tensor([VOCABULARY - 1]), 0.0)

    assert evaluate(certain, torch.zeros(8, dtype=torch.int64)).to_dict()["perplexity"] is None


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (torch.tensor([3]), {}, "at least two"),
        (torch.tensor([], dtype=torch.int64), {}, "0 token"),
        (torch.tensor([[1, 2], [3, 4]]), {}, "shape"),
        (torch.tensor([0.5, 1.0]), {}, "integer"),
        ("some text", {}, "Tokenize"),
        (torch.tensor([1, VOCABULARY]), {}, "vocabulary of 64"),
        (torch.tensor([1, -2]), {}, "negative"),
        (TEXT, {"length": 1}, "length=1"),
        (TEXT, {"length": 16, "stride": 17}, "stride=17"),
        (TEXT, {"stride": 0}, "stride=0"),
    ],
)
def test_bad_tokens_and_sizes(ids: Tensor, options: dict[str, int], message: str) -> None:
    with pytest.raises(LoopQError, match=message):
        evaluate(uniform, ids, **options)


def test_models_without_logits_and_unlike_vocabularies() -> None:
    with pytest.raises(LoopQError, match="logits"):
        evaluate(lambda ids: ids.float(), TEXT)
    with pytest.raises(LoopQError, match="different size"):
        evaluate(uniform, TEXT, teacher=lambda ids: torch.zeros(*ids.shape, VOCABULARY + 1))


def test_logits_of_the_last_token_are_not_enough() -> None:
    program = tiny_program().with_cache(last_token=True)
    with pytest.raises(LoopQError, match=r"logits for every token; two tokens gave \[1, 1, .*export without it"):
        evaluate(program, torch.arange(16))


def test_tokenizing() -> None:
    tokenizer = Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    assert tokenize(tokenizer, "a b a c").tolist() == [0, 1, 0, 2]
    assert tokenize(tokenizer, "a b a c", 2).tolist() == [0, 1]
    with pytest.raises(LoopQError, match="empty"):
        tokenize(tokenizer, "  ")
    with pytest.raises(LoopQError, match="tokenizer"):
        tokenize(None, "a b")
