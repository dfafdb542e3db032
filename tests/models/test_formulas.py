"""LoopFormer, Parcae and Huginn against formulas in float64, and what their configurations refuse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from loopq_compile.models import Huginn, LoopFormer, OuroConfig, Parcae, ParcaeConfig, read_config
from tests.looped_models import HUGINN, LOOPFORMER, PARCAE, with_random_weights
from tests.models import formulas
from tests.models.test_architectures import ids


def states(width: int) -> Tensor:
    """A state for every position of `ids(2, 9)`."""
    return torch.randn(2, 9, width, generator=torch.Generator().manual_seed(5))


def assert_logits(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [(1.0,), (0.25,) * 4, (0.5, 0.3, 0.2)], ids=["one", "even", "uneven"])
def test_loopformer_is_its_formula_for_any_schedule(steps: tuple[float, ...]) -> None:
    model = with_random_weights(LoopFormer(replace(LOOPFORMER, n_layer=2), steps))
    with torch.no_grad():
        found = model(ids(2, 9))
    assert_logits(found, formulas.loopformer(formulas.weights_of(model), ids(2, 9), steps, layers=2, heads=2))


def test_a_fresh_loopformer_predicts_about_evenly() -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        assert LoopFormer(LOOPFORMER)(ids(2, 9)).abs().max() < 1


@pytest.mark.parametrize("loops", [None, 1])
def test_huginn_is_its_formula(loops: int | None) -> None:
    model, state = with_random_weights(Huginn(HUGINN, loops)), states(32)
    with torch.no_grad():
        found = model(ids(2, 9), state)
    expected = formulas.huginn(formulas.weights_of(model), ids(2, 9), state, loops=loops or 3, heads=2)
    assert_logits(found, expected)


@pytest.mark.parametrize("injection", ["diagonal", "linear", "add"])
def test_parcae_is_its_formula(injection: str) -> None:
    model, state = with_random_weights(Parcae(replace(PARCAE, injection_type=injection))), states(32)
    assert set(model.value_embeds) == {"0", "2"}
    with torch.no_grad():
        found = model(ids(2, 9), state)
    expected = formulas.parcae(formulas.weights_of(model), ids(2, 9), state, 3, 2, injection, cap=15.0)
    assert_logits(found, expected)


@pytest.mark.parametrize(("kind", "config"), [(Parcae, PARCAE), (Huginn, HUGINN)])
def test_the_initial_state_is_the_seeds_and_the_same_at_every_call(kind: type, config: object) -> None:
    made = [with_random_weights(kind(config, seed=seed)) for seed in (0, 0, 1)]
    with torch.no_grad():
        first, again, other = (model(ids(2, 9)) for model in made)
        given = made[0](ids(2, 9), made[0].initial_state.expand(2, 9, -1))
    assert first.equal(again) and not torch.allclose(first, other)
    assert first.equal(given)


def test_a_zero_state() -> None:
    assert not Parcae(replace(PARCAE, state_init="zero")).initial_state.any()
    assert not Huginn(replace(HUGINN, state_scale=0.0)).initial_state.any()


@pytest.mark.parametrize(("kind", "config"), [(Parcae, PARCAE), (Huginn, HUGINN)])
def test_published_checkpoints_load_by_name_with_their_rotary_table(kind: type, config: object) -> None:
    source, target = with_random_weights(kind(config)), kind(config)
    target.load_state_dict({**source.state_dict(), "freqs_cis": torch.zeros(1, 4, 1, 8, 2)})
    with torch.no_grad():
        assert target(ids(2, 9)).equal(source(ids(2, 9)))
    with pytest.raises(RuntimeError, match="another"):
        target.load_state_dict({**source.state_dict(), "another": torch.zeros(1)})


@pytest.mark.parametrize(
    "values",
    [
        {"injection_type": "none"},
        {"state_init": "normal"},
        {"nonlin_name": "Tanh"},
        {"mlp_class_name": "MoE"},
        {"mean_recurrence": 0},
        {"num_attention_heads": 3},
        {"recurrent_num_attention_heads": 4},
        {"injection_type": "add", "recurrent_embedding_dimension": 64, "recurrent_num_attention_heads": 4},
    ],
    ids=str,
)
def test_parcae_refuses_what_does_not_fit(values: dict) -> None:
    with pytest.raises(ValueError, match=r"=|must agree"):
        replace(PARCAE, **values)


def test_other_refusals() -> None:
    with pytest.raises(ValueError, match="n_embd=32"):
        replace(HUGINN, n_heads=5)
    with pytest.raises(ValueError, match="mean_recurrence=0"):
        replace(HUGINN, mean_recurrence=0)
    with pytest.raises(ValueError, match="n_embd=32"):
        replace(LOOPFORMER, n_head=5)
    with pytest.raises(ValueError, match="steps"):
        LoopFormer(LOOPFORMER, ())
    with pytest.raises(ValueError, match="140m"):
        ParcaeConfig.published("7b")


def test_configurations_are_read_from_published_files() -> None:
    published = {"n_embd": 64, "n_heads": 4, "architectures": ["RavenForCausalLM"], "mean_recurrence": 8}
    config = read_config(type(HUGINN), published)
    assert (config.n_embd, config.n_heads, config.mean_recurrence) == (64, 4, 8)
    assert OuroConfig.ouro_2_6b().num_hidden_layers == 2 * OuroConfig.ouro_1_4b().num_hidden_layers
