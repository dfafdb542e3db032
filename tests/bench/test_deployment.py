"""`bench beyond`, `bench cache` and `bench size`."""

from __future__ import annotations

import pytest
import torch

from loopq_compile.bench import random_models
from loopq_compile.bench import size as size_module
from loopq_compile.bench.beyond import beyond
from loopq_compile.bench.cache import caches
from loopq_compile.bench.size import size
from loopq_compile.bench.size_session import run
from loopq_compile.bundled import calibration_tokens, held_out_text, load_model, load_tokenizer
from loopq_compile.graph.scheme import Scheme
from loopq_compile.models import Ouro, OuroConfig
from tests.decoding import ids
from tests.passes.loops.test_exit_early import ouro


def with_loops(count: int | None) -> Ouro:
    model = load_model()
    model.loops = count
    return model


@pytest.mark.nightly
def test_more_loops_than_calibrated_do_not_explode() -> None:
    tokens = torch.tensor(load_tokenizer().encode(held_out_text().passages[0]).ids[:128])
    scheme = Scheme.parse("w4a4", activation="static")
    report = beyond(with_loops, tokens, [4, 6], [scheme], "las", calibration_tokens(8, 128), length=128)
    four, six = report.data
    assert (four["loops"], six["loops"], six["calibrated"]) == (4, 6, 4)
    for row in (four, six):
        assert 0.9 < row["perplexity"] / row["full_precision"] < 1.6
    assert four["full_precision"] != six["full_precision"]


def test_fewer_bits_in_the_cache_cost_perplexity_and_save_bytes() -> None:
    report = caches(ouro(), ids(1, 32)[0], ["w4a16"], length=16)
    exact, eight, four = report.data
    # 3 loops of 2 layers, keys and values, 2 heads of 8 channels.
    assert exact["bytes"] == 3 * 2 * 2 * 2 * 8 * 4
    assert eight["bytes"] == 3 * 2 * 2 * 2 * (8 + 4) and four["bytes"] == 3 * 2 * 2 * 2 * (4 + 4)
    assert exact["kl"] is None and 0 < eight["kl"] < four["kl"]


def test_a_model_is_compiled_end_to_end(monkeypatch) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = OuroConfig(vocab_size=128, total_ut_steps=2, tie_word_embeddings=False, **sizes)
    monkeypatch.setattr(random_models, "SIZES", {"tiny": lambda: config})
    monkeypatch.setattr(size_module, "measure", run)
    report = size("tiny")
    by = {row["what"]: row for row in report.data}
    assert by["export"]["seconds"] > 0 and by["all together"]["peak"] > 1e6
    output, attention, mlp = 256 * 256, 4 * 256 * 256, 3 * 256 * 512
    assert by["packed weights, UINT8"]["bytes"] == (attention + mlp) / 2
    assert by["scales of weights, FLOAT16"]["bytes"] == (attention - output + mlp) / 32 * 2
    assert by["scales of weights, FLOAT"]["bytes"] == output / 32 * 4  # too few for a node that widens them
    assert by["embeddings, FLOAT16"]["bytes"] == 128 * 256 * 2 and by["head, UINT8"]["bytes"] == 128 * 256
    assert by["on disk"]["bytes"] > (attention + mlp) / 2 and by["loaded"]["bytes"] > 0
