"""The training script: its batches, its objective, and that a stopped run continues as if it had not stopped."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from loopq_compile.models import Ouro, OuroConfig

SCRIPT = Path(__file__).parents[2] / "examples" / "train_bundled.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_bundled", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_bundled"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def make_run(script):
    torch.manual_seed(0)
    config = OuroConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    model, settings = Ouro(config), script.Settings(batch=2, length=16)
    return script.Run(model, script.make_optimizers(model, settings), settings)


def batch(step):
    return torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(step))


def test_every_stage_has_weights_and_chances_that_sum_to_one(script):
    for progress in (0.0, 0.3, 0.5, 0.9):
        mix, chances = script.stage(progress, script.Settings())
        assert abs(sum(chances.values()) - 1) < 1e-9
        for loops in (1, *chances):
            weights = mix.loop_weights(loops)
            assert weights.sum() == pytest.approx(1) and bool((weights.diff() >= 0).all())


def test_the_rate_rises_holds_and_falls(script):
    rates = [script.learning_rate(progress, script.Settings()) for progress in (0.0, 0.005, 0.3, 0.8, 1.0)]
    assert rates == pytest.approx([0, 0.5, 1, 0.51, 0.02])


def test_batches_cover_an_epoch_once_and_restart_anywhere(script):
    settings = script.Settings(batch=2, length=4)
    tokens, offsets = np.arange(41, dtype=np.uint16), np.array([0, 10, 25, 41])
    stream = script.batches(tokens, offsets, settings, 0)
    epoch = [next(stream) for _ in range(5)]
    assert all(rows.shape == (2, 5) for rows in epoch)
    inputs = torch.cat([rows[:, :-1].flatten() for rows in epoch])
    assert len(inputs.unique()) == 40
    assert torch.equal(next(script.batches(tokens, offsets, settings, 3)), epoch[3])


def test_a_resumed_run_equals_one_that_never_stopped(script, tmp_path):
    whole, first, second = make_run(script), make_run(script), make_run(script)
    for step in range(4):
        whole.advance(script.head_loss, batch(step), 0.5)
    for step in range(2):
        first.advance(script.head_loss, batch(step), 0.5)
    first.save(tmp_path / "checkpoint.pt")
    second.load(tmp_path / "checkpoint.pt")
    for step in range(2, 4):
        second.advance(script.head_loss, batch(step), 0.5)
    assert (second.step, second.tokens) == (whole.step, whole.tokens) == (4, 4 * 32)
    for name, parameter in whole.model.named_parameters():
        torch.testing.assert_close(second.model.get_parameter(name), parameter)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_training_lowers_the_loss_of_every_loop(script):
    run = make_run(script)
    losses = [run.advance(script.head_loss, batch(0), 0.3)[:2] for _ in range(30)]
    assert losses[-1][0] < losses[0][0] and losses[-1][1] < losses[0][1]


def test_the_objective_is_the_stated_mix(script):
    run, mix = make_run(script), script.Mix(expected=0.3, power=1, entropy=0.1)
    loss, losses = script.looped_loss(run.model, script.head_loss, batch(0), 2, mix)
    # The new gate is undecided: half stop after loop 1 and the rest after loop 2.
    mean, expected, entropy = (losses[0] + 2 * losses[1]) / 3, losses.mean(), np.log(2)
    assert loss.item() == pytest.approx((0.7 * mean + 0.3 * expected).item() - 0.1 * entropy, abs=1e-4)
