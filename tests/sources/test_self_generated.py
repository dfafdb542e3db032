"""Calibration text that a model samples itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loopq_compile import bundled
from loopq_compile.errors import LoopQError
from loopq_compile.models import repeat_layers
from loopq_compile.sources.self_generated import calibration_data, fingerprint, first_token, generate_tokens
from tests.cli_models import TEXT, tiny_llama, tiny_ouro, tokenizer


class Counter(nn.Module):
    """Predicts n + 1 after token n; counts how often it was called."""

    def __init__(self, vocabulary: int = 12) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.eye(vocabulary).roll(1, 1) * 1e4)
        self.calls = 0

    def forward(self, ids: Tensor) -> Tensor:
        self.calls += 1
        return self.table[ids]


def test_rows_follow_the_model() -> None:
    (rows,) = generate_tokens(Counter(), 3, samples=2, length=6)
    assert rows.tolist() == [[3, 4, 5, 6, 7, 8]] * 2
    (rows,) = generate_tokens(Counter(), None, samples=20, length=3, batch=20)
    assert len(set(rows[:, 0].tolist())) > 3
    assert ((rows[:, 1:] - rows[:, :-1]) % 12 == 1).all()


def test_sizes_and_seeds() -> None:
    model = tiny_ouro()
    rows = generate_tokens(model, None, samples=5, length=7, seed=1, batch=2)
    assert [list(x.shape) for x in rows] == [[2, 7], [2, 7], [1, 7]]
    state = torch.random.get_rng_state()
    again = generate_tokens(model, None, samples=5, length=7, seed=1, batch=2)
    assert torch.random.get_rng_state().equal(state)
    assert torch.cat(rows).equal(torch.cat(again)) and not rows[0].equal(rows[1])
    assert not torch.cat(rows).equal(torch.cat(generate_tokens(model, None, 5, 7, seed=2, batch=2)))


def test_the_cache_of_a_model_does_not_change_what_it_says() -> None:
    model = repeat_layers(tiny_llama(layers=3), 1, 2, 2)
    with_cache = generate_tokens(model, 5, samples=3, length=12)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, ids: Tensor) -> Any:
            return self.inner(input_ids=ids, use_cache=False)

    assert generate_tokens(Plain(), 5, samples=3, length=12)[0].equal(with_cache[0])
    assert (with_cache[0][:, 0] == 5).all()


def test_samples_follow_the_distribution() -> None:
    model = Counter(3)
    probabilities = torch.tensor([0.2, 0.5, 0.3])
    model.table.data = probabilities.log().expand(3, 3)
    (rows,) = generate_tokens(model, 0, samples=400, length=6, batch=400)
    counts = torch.bincount(rows[:, 1:].flatten(), minlength=3) / 2000
    torch.testing.assert_close(counts, probabilities, rtol=0, atol=0.05)


def test_batches_are_kept_one_by_one(tmp_path: Path) -> None:
    model = Counter()
    rows = generate_tokens(model, None, samples=6, length=4, batch=2, cache=tmp_path)
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 3
    asked = model.calls
    again = generate_tokens(model, None, samples=6, length=4, batch=2, cache=tmp_path)
    assert model.calls == asked and torch.cat(again).equal(torch.cat(rows))
    files[1].write_bytes(b"cut off")
    assert torch.cat(generate_tokens(model, None, 6, 4, batch=2, cache=tmp_path)).equal(torch.cat(rows))
    assert model.calls > asked
    with torch.no_grad():
        model.table[0, 0] += 1
    generate_tokens(model, None, samples=6, length=4, batch=2, cache=tmp_path)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 6


def test_fingerprints() -> None:
    assert fingerprint(tiny_ouro()) == fingerprint(tiny_ouro()) != fingerprint(tiny_ouro(loops=3))
    plain, looped = tiny_llama(layers=3), repeat_layers(tiny_llama(layers=3), 1, 1, 2)
    assert fingerprint(plain) != fingerprint(looped)
    other = tiny_llama(layers=4)
    repeated = repeat_layers(tiny_llama(layers=3), 0, 0, 2)
    assert len({fingerprint(model) for model in (other, looped, repeated)}) == 3


def test_where_text_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled, "load_tokenizer", tokenizer)
    docs = torch.full((8, 6), 63)
    monkeypatch.setattr(bundled, "calibration_tokens", lambda samples, *_: [docs[:samples]])
    model = tiny_ouro()
    own = torch.cat(calibration_data("self", model, tokenizer(), 5, 6))
    assert own.equal(torch.cat(generate_tokens(model, None, 5, 6)))
    assert torch.cat(calibration_data("docs", None, tokenizer(), 5, 6)).equal(docs[:5])
    mixed = calibration_data("mixed", model, tokenizer(), 5, 6)
    assert [len(batch) for batch in mixed] == [4, 1]
    rows = torch.cat(mixed)
    assert [row.equal(docs[0]) for row in rows] == [False, True, False, True, False]
    (tmp_path / "text.txt").write_text(TEXT)
    file = torch.cat(calibration_data(str(tmp_path / "text.txt"), None, tokenizer(), 3, 10))
    ids = torch.tensor(tokenizer().encode(TEXT).ids).view(-1, 10)
    assert len(file) == 3 and all((row == ids).all(1).any() for row in file)


def test_the_first_token_is_the_configuration_s() -> None:
    assert first_token(tiny_llama()) == 0 and first_token(tiny_ouro()) is None and first_token(object()) is None


def test_bad_requests(tmp_path: Path) -> None:
    with pytest.raises(LoopQError, match="length=0"):
        generate_tokens(Counter(), None, length=0)
    with pytest.raises(LoopQError, match="vocabulary of 12"):
        generate_tokens(Counter(), 12)
    with pytest.raises(LoopQError, match="sampled by the model"):
        calibration_data("mixed", None, tokenizer(), 2, 4)
    with pytest.raises(LoopQError, match="samples=0"):
        calibration_data("docs", None, tokenizer(), 0, 4)
    (tmp_path / "file").write_text("")
    with pytest.raises(LoopQError, match="Cannot write"):
        generate_tokens(Counter(), None, 1, 2, cache=tmp_path / "file")
