"""`exit-early`: when a loop stops, what the program then returns, and what the caches of skipped loops hold."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

import loopq_compile as lq
from loopq_compile.bench.exits import exits
from loopq_compile.generation.decoders import Chosen, TokenByToken
from loopq_compile.generation.sampling import generate
from loopq_compile.models import Ouro
from tests import decoding, zoo
from tests.decoding import ids
from tests.tiny import tiny_model


@functools.cache
def ouro() -> Ouro:
    """Three loops and a gate whose answers differ from token to token."""
    torch.manual_seed(0)
    model = decoding.ouro()
    assert isinstance(model, Ouro)
    torch.nn.init.normal_(model.model.early_exit_gate.weight, std=0.1)
    torch.nn.init.constant_(model.model.early_exit_gate.bias, 0.5)
    return model.eval()


@functools.cache
def program(scheme: str = "w4a8", masked: bool = False) -> lq.Program:
    example = {"input_ids": ids(), **({"attention_mask": torch.ones_like(ids())} if masked else {})}
    return lq.compile(ouro(), example, scheme=scheme, method="symmetric")


def cumulative(exit_logits: Tensor) -> Tensor:
    """Probability of having stopped by each loop, as the sum of `stop here, having come so far`."""
    stop, reached, total = torch.sigmoid(exit_logits), torch.ones_like(exit_logits[..., 0]), []
    for loop in range(exit_logits.shape[-1]):
        total.append(reached * stop[..., loop])
        reached = reached * (1 - stop[..., loop])
    return torch.stack(total, -1).cumsum(-1)


def test_from_one_on_nothing_changes() -> None:
    early = program().with_early_exit()
    expected = program()(ids())
    for threshold in (None, 1, 1.0, 2.5):
        given = early(ids(), exit_threshold=threshold)
        assert int(given["loops_spent"]) == 3
        assert torch.equal(given["logits"], expected.logits) and torch.equal(given["exit_logits"], expected.exit_logits)


@pytest.mark.parametrize("masked", [False, True])
def test_the_loop_stops_when_the_last_token_is_done(masked: bool) -> None:
    early = program(masked=masked).with_early_exit()
    mask = torch.ones_like(ids())
    mask[1, :3] = 0
    given = {"attention_mask": mask} if masked else {}
    whole = program(masked=masked)(ids(), **given)
    done = cumulative(whole.exit_logits)
    done = done[mask != 0].amin(0) if masked else done.amin((0, 1))
    spent = set()
    for threshold in (0.3, float(done[0]) - 1e-4, float(done[1]) - 1e-4, float(done[1]) + 1e-4, 0.999):
        result = early(ids(), exit_threshold=threshold, **given)
        count = next((t + 1 for t in range(3) if done[t] >= threshold), 3)
        assert int(result["loops_spent"]) == count
        spent.add(count)
        # Loops that did not run repeat the last one.
        assert torch.equal(result["exit_logits"][..., :count], whole.exit_logits[..., :count])
        assert torch.equal(result["exit_logits"][..., count:], whole.exit_logits[..., [count - 1] * (3 - count)])
    assert spent == {1, 2, 3}


def test_logits_are_those_of_a_model_with_so_many_loops() -> None:
    early = program("w4a16").with_early_exit()
    result = early(ids(), exit_threshold=1e-6)
    assert int(result["loops_spent"]) == 1
    short = Ouro(ouro().config, loops=1)
    short.load_state_dict(ouro().state_dict())
    expected = lq.compile(short.eval(), ids(), scheme="w4a16", method="symmetric")(ids())
    torch.testing.assert_close(result["logits"], expected.logits)


def test_skipped_loops_have_the_last_computed_loops_keys_and_values() -> None:
    early = program().with_early_exit(cache=True)
    prompt = early(ids(2, 6))
    past = {k.replace("present", "past_key_values"): v for k, v in prompt.items() if k.startswith("present")}
    mask = torch.ones(2, 7, dtype=torch.int64)
    step = early(input_ids=ids(2, 1, 5), attention_mask=mask, exit_threshold=1e-6, **past)
    assert int(step["loops_spent"]) == 1
    for name, before in past.items():
        after = step[name.replace("past_key_values", "present")]
        assert torch.equal(after[..., :6, :], before)
        assert torch.equal(after[1:, ..., 6:, :], after[:1, ..., 6:, :].expand(2, -1, -1, -1, -1))
    full = early(input_ids=ids(2, 1, 5), attention_mask=mask, **past)
    assert not torch.equal(full["present.0.key"], step["present.0.key"])


def test_generation_spends_fewer_loops_and_none_with_a_threshold_of_one() -> None:
    tokens = ids(2, 6)
    expected = program().generate(tokens, 6)
    assert torch.equal(program().generate(tokens, 6, exit_threshold=1.0), expected)
    chosen = Chosen(program(), exit_threshold=0.3)
    generate(chosen, tokens, 6)
    assert len(chosen.last.loops_spent) == 6 and 1 <= min(chosen.last.loops_spent) < 3
    recomputed = Chosen(program().with_early_exit(), exit_threshold=1.0)
    assert torch.equal(generate(recomputed, tokens, 6), expected)
    assert recomputed.last.loops_spent == [3] * 6


def test_it_survives_saving(tmp_path) -> None:
    early = program().with_early_exit(cache=True)
    early.save(tmp_path)
    given, expected = lq.load(tmp_path)(ids(), exit_threshold=0.5), early(ids(), exit_threshold=0.5)
    assert int(given["loops_spent"]) == int(expected["loops_spent"]) < 3
    assert torch.equal(given["logits"], expected["logits"])
    assert early.graph_module is not program().graph_module and "loops_spent" not in str(program())


def test_what_is_refused() -> None:
    with pytest.raises(lq.LoopQError, match="no exit gate"):
        zoo.tagged("albert").with_early_exit()
    with pytest.raises(lq.LoopQError, match="a loop that is rolled"):
        zoo.tagged("plain").with_early_exit()
    with pytest.raises(lq.LoopQError, match="first one is separate"):
        zoo.tagged("inject-later").with_early_exit()
    with pytest.raises(lq.LoopQError, match="runs all its loops"):
        program()(ids(), exit_threshold=0.5)
    with pytest.raises(lq.LoopQError, match="probability above 0"):
        program().with_early_exit()(ids(), exit_threshold=0)
    with pytest.raises(lq.LoopQError, match="no exit gate"):
        zoo.tagged("albert").decoder(exit_threshold=0.5)


def test_the_gate_is_found_without_a_name_and_twice_is_nothing_new() -> None:
    early = lq.compile(tiny_model(), ids(), scheme="w4a16", method="symmetric").with_early_exit()
    assert int(early(ids(), exit_threshold=1e-6)["loops_spent"]) == 1
    assert int(early.with_early_exit()(ids())["loops_spent"]) == 3


@pytest.mark.nightly
def test_the_curve_falls_with_the_threshold() -> None:
    report = exits(ouro(), ids(1, 24)[0], ["w4a8"], [1, 0.8, 0.3], length=12)
    loops = [row["loops"] for row in report.data]
    assert loops[0] == 3 and loops == sorted(loops, reverse=True) and loops[-1] < 2
    first = report.data[0]
    assert first["picked_loops"] == 3
    assert abs(first["picked_perplexity"] - first["perplexity"]) < 1e-3 * first["perplexity"]


def test_token_by_token_is_the_whole_window() -> None:
    logits = TokenByToken(program("w4a16"))(ids())
    torch.testing.assert_close(logits, program("w4a16")(ids()).logits, rtol=1e-4, atol=1e-4)
