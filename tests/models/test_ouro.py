"""The Ouro-style reference model: against independent formulas, by hand, under padding and under export."""

import math

import pytest
import torch
from torch import Tensor

from loopq_compile.models import LoopedLMOutput, Ouro, OuroConfig, exit_distribution
from loopq_compile.models.ouro import OuroAttention, rotary_tables

SMALL = OuroConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)


def make(config: OuroConfig = SMALL, seed: int = 0, **options) -> Ouro:
    torch.manual_seed(seed)
    model = Ouro(config, **options).eval()
    torch.nn.init.normal_(model.model.early_exit_gate.weight)
    return model


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(0, SMALL.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def textbook_attention(attention: OuroAttention, x: Tensor, heads: int, theta: float) -> Tensor:
    """Attention with complex rotations, one head and one query at a time."""
    batch, length, hidden = x.shape
    size = hidden // heads
    kv_heads = attention.k_proj.out_features // size
    frequencies = torch.tensor([theta ** (-2 * i / size) for i in range(size // 2)])
    turns = torch.polar(torch.ones(length, size // 2), torch.arange(length)[:, None] * frequencies)

    def turned(channels: Tensor) -> Tensor:
        return torch.complex(channels[..., : size // 2], channels[..., size // 2 :]) * turns

    query, key, value = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
    rows = torch.zeros(batch, length, hidden)
    for head in range(heads):
        own, shared = slice(head * size, (head + 1) * size), head * kv_heads // heads
        kv = slice(shared * size, (shared + 1) * size)
        q, k = turned(query[..., own]), turned(key[..., kv])
        for position in range(length):
            scores = (q[:, position, None] * k[:, : position + 1].conj()).real.sum(-1) / math.sqrt(size)
            rows[:, position, own] = (scores.softmax(-1)[..., None] * value[:, : position + 1, kv]).sum(1)
    return attention.o_proj(rows)


@pytest.mark.parametrize("kv_heads", [None, 2, 1])
def test_attention_equals_the_textbook(kv_heads):
    config = OuroConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=kv_heads)
    torch.manual_seed(0)
    attention, x = OuroAttention(config), torch.randn(2, 7, 32)
    cos, sin = rotary_tables(torch.arange(7), config.head_dim, config.rope_theta)
    expected = textbook_attention(attention, x, heads=4, theta=config.rope_theta)
    torch.testing.assert_close(attention(x, cos, sin, None), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("loops", [1, 2, 4, 6])
def test_forward_is_the_stack_run_by_hand(loops):
    model, ids = make(loops=loops), tokens(2, 9)
    cos, sin = rotary_tables(torch.arange(9), SMALL.head_dim, SMALL.rope_theta)
    state, gates = model.model.embed_tokens(ids), []
    for _ in range(loops):
        for layer in model.model.layers:
            state = layer(state, cos, sin, None)
        state = model.model.norm(state)
        gates.append(model.model.early_exit_gate(state))
    output = model(ids)
    assert isinstance(output, LoopedLMOutput)
    torch.testing.assert_close(output.logits, model.lm_head(state))
    torch.testing.assert_close(output.exit_logits, torch.cat(gates, -1))


def test_loop_states_of_more_loops_begin_with_those_of_fewer():
    model, ids = make(), tokens(1, 5)
    few, _ = model.loop_states(ids, loops=2)
    many, exits = model.loop_states(ids, loops=5)
    assert len(many) == exits.shape[-1] == 5
    torch.testing.assert_close(many[1], few[1])
    torch.testing.assert_close(model(ids).logits, model.lm_head(many[3]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_real_tokens(side):
    model, ids = make(), tokens(2, 6)
    padding, keep, drop = (
        tokens(2, 3, seed=5),
        torch.ones(2, 6, dtype=torch.int64),
        torch.zeros(2, 3, dtype=torch.int64),
    )
    parts, masks, real = (
        ([padding, ids], [drop, keep], slice(3, None))
        if side == "left"
        else ([ids, padding], [keep, drop], slice(0, 6))
    )
    padded = model(torch.cat(parts, 1), torch.cat(masks, 1))
    expected = model(ids)
    torch.testing.assert_close(padded.logits[:, real], expected.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(padded.exit_logits[:, real], expected.exit_logits, atol=1e-4, rtol=1e-4)


def test_a_row_of_padding_alone_stays_finite():
    model, ids = make(), tokens(2, 4)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])
    output = model(ids, mask)
    assert output.logits.isfinite().all() and output.exit_logits.isfinite().all()
    torch.testing.assert_close(output.logits[:1], model(ids[:1]).logits, atol=1e-5, rtol=1e-4)


def test_later_tokens_do_not_reach_earlier_ones():
    model, ids = make(), tokens(1, 8)
    changed = ids.clone()
    changed[0, 5] = (ids[0, 5] + 1) % SMALL.vocab_size
    before, after = model(ids).logits, model(changed).logits
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5], after[:, 5])


def test_exit_distribution_is_stop_times_not_stopped_before():
    logits = torch.randn(3, 5, 4)
    stop = logits.sigmoid()
    reached = torch.ones(3, 5)
    for loop in range(3):
        torch.testing.assert_close(exit_distribution(logits)[..., loop], stop[..., loop] * reached)
        reached = reached * (1 - stop[..., loop])
    torch.testing.assert_close(exit_distribution(logits)[..., 3], reached)
    torch.testing.assert_close(exit_distribution(logits).sum(-1), torch.ones(3, 5))


def test_exit_distribution_survives_extreme_logits_and_their_gradient():
    logits = torch.tensor([[200.0, -200.0, 200.0, 0.0]], requires_grad=True)
    exit_distribution(logits)[..., 1].sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


@pytest.mark.parametrize("with_mask", [False, True], ids=["plain", "mask"])
def test_export_keeps_batch_and_length_dynamic(with_mask):
    model = make()
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    arguments = (tokens(2, 8),) + ((torch.ones(2, 8, dtype=torch.int64),) if with_mask else ())
    shapes = ({0: batch, 1: length},) * len(arguments)
    program = torch.export.export(model, arguments, dynamic_shapes=shapes, strict=False)
    for shape in [(3, 5), (1, 1), (1, 12)]:
        inputs = (tokens(*shape),) + ((torch.ones(shape, dtype=torch.int64),) if with_mask else ())
        exported, expected = program.module()(*inputs), model(*inputs)
        torch.testing.assert_close(exported.logits, expected.logits, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(exported.exit_logits, expected.exit_logits, atol=1e-5, rtol=1e-4)


def test_parameters_carry_ouros_names_and_the_head_is_tied():
    model = make()
    names = {name.replace("layers.1.", "layers.N.") for name, _ in model.named_parameters() if "layers.0." not in name}
    layer = [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ]
    layer += ["input_layernorm", "input_layernorm_2", "post_attention_layernorm", "post_attention_layernorm_2"]
    expected = {f"model.layers.N.{name}.weight" for name in layer}
    expected |= {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.early_exit_gate.weight",
        "model.early_exit_gate.bias",
    }
    assert names == expected
    assert model.lm_head.weight is model.model.embed_tokens.weight
    untied = Ouro(OuroConfig(hidden_size=32, num_attention_heads=4, tie_word_embeddings=False))
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


def test_a_fresh_model_has_states_and_logits_of_moderate_size():
    config = OuroConfig(vocab_size=500, hidden_size=64, num_attention_heads=4, embedding_scale=8.0)
    torch.manual_seed(0)
    model = Ouro(config)
    ids = torch.randint(0, 500, (2, 16))
    states, exits = model.loop_states(ids)
    assert all(0.8 < state.std() < 1.2 for state in states)
    assert model(ids).logits.std() < 2
    torch.testing.assert_close(exit_distribution(exits)[0, 0], torch.tensor([0.5, 0.25, 0.125, 0.125]))


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_size": 30},
        {"num_attention_heads": 6, "num_key_value_heads": 4},
        {"total_ut_steps": 0},
        {"hidden_size": 18},
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused(values):
    with pytest.raises(ValueError, match="="):
        OuroConfig(**values)


def test_configuration_round_trip_ignores_foreign_keys():
    assert OuroConfig.from_dict({**SMALL.to_dict(), "figures": {}}) == SMALL
