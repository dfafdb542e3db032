"""Looped models made of ordinary ones by repeating layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import loopq_compile as lq
from loopq_compile.errors import LoopQError
from loopq_compile.models import Repeat, repeat_layers
from tests.cli_models import tiny_llama, tiny_ouro

IDS = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(1))


def logits(model: Any, ids: torch.Tensor = IDS, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **{"use_cache": False, **options}).logits


def test_layers_run_in_the_order_of_the_repeated_list() -> None:
    model = tiny_llama(layers=4)
    called: list[int] = []
    originals = list(model.model.layers)
    for number, layer in enumerate(originals):
        layer.mlp.register_forward_hook(lambda *_, number=number: called.append(number))
    logits(repeat_layers(model, 1, 2, 3))
    assert called == [0, 1, 2, 1, 2, 1, 2, 3]
    assert model.config.num_hidden_layers == 8
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == list(range(8))
    assert originals[1].self_attn.layer_idx == 1


def test_weights_are_shared_and_no_new_ones_appear() -> None:
    model = tiny_llama(layers=3)
    before = {id(parameter) for parameter in model.parameters()}
    repeat_layers(model, 1, 1, 4)
    assert {id(parameter) for parameter in model.parameters()} == before
    first, second = model.model.layers[1], model.model.layers[2]
    assert first is not second and first.self_attn.q_proj.weight is second.self_attn.q_proj.weight


def test_once_changes_nothing() -> None:
    expected = logits(tiny_llama())
    assert logits(repeat_layers(tiny_llama(), 0, 1, 1)).equal(expected)


@pytest.mark.parametrize("name", ["LlamaConfig", "Qwen3Config", "Gemma2Config"])
def test_every_position_has_its_own_entry_in_the_cache(name: str) -> None:
    model = repeat_layers(tiny_llama(layers=3, config=name), 1, 2, 2)
    with torch.no_grad():
        start = model(input_ids=IDS[:, :5], use_cache=True)
    rest = logits(model, IDS[:, 5:], use_cache=True, past_key_values=start.past_key_values)
    torch.testing.assert_close(rest, logits(model)[:, 5:], rtol=1e-4, atol=1e-5)
    made = model.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    again = IDS
    for _ in range(4):
        again = torch.cat([again, logits(model, again)[:, -1:].argmax(-1)], 1)
    assert made.equal(again)


def test_kinds_of_layers_are_repeated_with_them() -> None:
    model = tiny_llama(layers=4, config="Gemma2Config")
    kinds = list(model.config.layer_types)
    repeat_layers(model, 1, 2, 2)
    assert model.config.layer_types == [kinds[i] for i in (0, 1, 2, 1, 2, 3)]


def test_the_compiler_finds_the_loop() -> None:
    model = repeat_layers(tiny_llama(layers=4), 1, 2, 3)
    program = lq.compile(model, scheme="w8a8", method="symmetric")
    assert program.loops.count == 3
    torch.testing.assert_close(program(input_ids=IDS).logits, logits(model), rtol=0.1, atol=0.1)


@pytest.mark.parametrize(("first", "last", "times"), [(2, 1, 2), (0, 2, 2), (-1, 0, 2)])
def test_ranges_outside_the_model(first: int, last: int, times: int) -> None:
    with pytest.raises(LoopQError, match="LlamaForCausalLM has 0-1"):
        repeat_layers(tiny_llama(), first, last, times)


def test_unusable_models_and_counts() -> None:
    with pytest.raises(LoopQError, match="times=0"):
        repeat_layers(tiny_llama(), 0, 1, 0)
    with pytest.raises(LoopQError, match="Ouro has no list of layers"):
        repeat_layers(tiny_ouro(), 0, 0, 2)
    with pytest.raises(LoopQError, match="no list of layers"):
        repeat_layers(torch.nn.Linear(2, 2), 0, 0, 2)
    model = tiny_llama()
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(LoopQError, match="linear_attention"):
        repeat_layers(model, 0, 0, 2)


def test_reading_the_option() -> None:
    assert Repeat.parse("12-15x3") == (12, 15, 3) and Repeat.parse("4x2") == (4, 4, 2)
    assert str(Repeat.parse("12-15x3")) == "12-15x3"
    for text in ("12-15", "x3", "a-bx2", "", "1-2x-3"):
        with pytest.raises(LoopQError, match="12-15x3"):
            Repeat.parse(text)
