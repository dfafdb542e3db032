"""The shipped model has learned, and its text is where the manifest says."""

import json
from importlib.resources import files

import pytest
import torch
from torch.nn import functional as F

from loopq_compile import bundled
from loopq_compile.errors import LoopQError

MEBIBYTE = 2**20


@pytest.fixture(scope="module")
def model():
    return bundled.load_model()


@pytest.fixture(scope="module")
def held_out():
    return bundled.held_out_text()


@pytest.fixture(scope="module")
def loop_losses(model, held_out):
    """Held-out loss of loops 1 to 6 on a few thousand tokens."""
    tokenizer, ids = bundled.load_tokenizer(), []
    for passage in held_out.passages[::5]:
        ids += [*tokenizer.encode(passage).ids, 0]
    rows = torch.tensor(ids[: 24 * 257]).view(-1, 257)
    with torch.no_grad():
        states, _ = model.loop_states(rows[:, :-1], loops=6)
        return [F.cross_entropy(model.lm_head(state).flatten(0, 1), rows[:, 1:].flatten()).item() for state in states]


def figures():
    return json.loads(files("loopq_compile.bundled").joinpath("config.json").read_text())["figures"]


def test_the_model_loads_ready_to_use(model):
    assert not model.training and model.config.total_ut_steps == 4
    assert all(parameter.dtype == torch.float32 and parameter.isfinite().all() for parameter in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert bundled.load_tokenizer().get_vocab_size() == model.config.vocab_size
    linears = [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert linears and all(linear.in_features % 32 == 0 for linear in linears)


def test_loading_leaves_the_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    bundled.load_model()
    torch.testing.assert_close(torch.rand(2), expected)


def test_the_package_data_stays_small():
    sizes = [
        entry.stat().st_size
        for entry in files("loopq_compile.bundled").iterdir()
        if entry.is_file() and entry.suffix != ".py"
    ]
    assert len(sizes) >= 5 and sum(sizes) < 8 * MEBIBYTE


def test_held_out_text_is_found_and_counted(held_out):
    assert 0 < held_out.passages_found <= held_out.passages_total
    assert 0 < held_out.characters_found <= held_out.characters_total
    assert held_out.passages_found == len(held_out.passages) > 0.3 * held_out.passages_total
    assert f"{held_out.passages_found} of {held_out.passages_total}" in str(held_out)


def test_the_model_has_learned(loop_losses):
    unigram = figures()["unigram_loss"]
    assert max(loop_losses[1:4]) < unigram - 2.5


def test_loops_help_and_more_than_trained_do_not_explode(loop_losses):
    first, second, third, fourth, _, sixth = loop_losses
    assert max(second, third, fourth) < first
    assert sixth < first


def test_the_card_speaks_of_this_model(loop_losses):
    stated = figures()["loss_per_loop"]
    assert len(stated) == 6 and f"{stated[3]:.3f}" in bundled.model_card()
    assert abs(loop_losses[3] - stated[3]) < 0.5  # a sample of the set, and library versions move the text


def test_the_exit_gate_has_been_trained(model):
    assert model.model.early_exit_gate.weight.abs().max() > 0.01


def test_calibration_tokens_have_the_asked_shape_and_repeat():
    batches = bundled.calibration_tokens(samples=10, length=48, seed=7)
    assert [tuple(batch.shape) for batch in batches] == [(4, 48), (4, 48), (2, 48)]
    assert all(batch.dtype == torch.int64 for batch in batches)
    again = bundled.calibration_tokens(samples=10, length=48, seed=7)
    assert all(torch.equal(a, b) for a, b in zip(batches, again, strict=True))
    assert not torch.equal(bundled.calibration_tokens(samples=10, length=48, seed=8)[0], batches[0])


def test_calibration_never_sees_held_out_text(held_out):
    tokenizer = bundled.load_tokenizer()
    text = tokenizer.decode(torch.cat(bundled.calibration_tokens(samples=256, length=512)).flatten().tolist())
    assert len(text) > 200_000
    assert not any(passage in text for passage in held_out.passages)


@pytest.mark.parametrize(
    "options", [{"samples": 0}, {"length": -1}, {"batch": 0}, {"samples": 100_000, "length": 1000}], ids=str
)
def test_impossible_calibration_sizes_are_refused(options):
    with pytest.raises(LoopQError, match="samples="):
        bundled.calibration_tokens(**options)


def test_nothing_found_is_an_error_and_missing_parts_are_not(monkeypatch, held_out):
    monkeypatch.setattr(bundled, "_read_json", lambda name: {"no_such_package/x.py": [["0" * 16, 120]]})
    with pytest.raises(LoopQError, match="none of the 1 held-out passages"):
        bundled.held_out_text.__wrapped__()


def test_missing_package_data_says_what_to_do():
    with pytest.raises(LoopQError, match="reinstall"):
        bundled._read_text("no-such-file.json")
