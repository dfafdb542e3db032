"""Hugging Face causal language models: captured without examples, masks without vmap, no cache."""

import pytest
import torch
import transformers

from loopq_compile import LoopQError
from loopq_compile.capture.to_graph import capture
from loopq_compile.passes.loops.tag_loops import TagLoops
from loopq_compile.program import Program

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def llama(attention: str = "sdpa") -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, **HEADS, attn_implementation=attention)
    return transformers.LlamaForCausalLM(config).eval()


def gpt2() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).eval()


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(length))


def padding(ids: torch.Tensor) -> torch.Tensor:
    mask = torch.ones_like(ids)
    mask[0, ids.shape[1] // 2 + 1 :] = 0
    return mask


@pytest.mark.parametrize("make", [llama, lambda: llama("eager"), gpt2], ids=["sdpa", "eager", "gpt2"])
@pytest.mark.parametrize("with_mask", [False, True], ids=["plain", "mask"])
def test_a_causal_language_model_is_captured(make, with_mask):
    model = make()
    ids = tokens(2, 7)
    program = Program(capture(model, {"input_ids": ids, "attention_mask": padding(ids)} if with_mask else None))
    for batch, length in ((2, 7), (1, 1), (3, 4)):
        inputs = {"input_ids": tokens(batch, length)}
        if with_mask:
            inputs["attention_mask"] = padding(inputs["input_ids"])
        with torch.no_grad():
            expected = model(**inputs, use_cache=False)
        found = program(**inputs)
        assert type(found) is type(expected)
        assert list(found.keys()) == ["logits"]  # fields that are None are left out
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)


def test_example_ids_alone_switch_the_cache_off():
    program = Program(capture(llama(), tokens(2, 7)))
    assert program(tokens(1, 3)).past_key_values is None
    with pytest.raises(LoopQError, match="'use_cache' was captured as False, now it is True"):
        program(tokens(1, 3), use_cache=True)


def test_a_cache_is_refused_with_a_way_out():
    with pytest.raises(LoopQError, match="use_cache=False"):
        capture(llama(), {"input_ids": tokens(2, 7), "use_cache": True})


def test_mask_functions_of_transformers_are_put_back():
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as functions

    before = {name: functions[name] for name in ("sdpa", "eager")}
    capture(llama())
    assert {name: functions[name] for name in before} == before


def test_layers_that_differ_are_no_loop():
    graph_module = capture(llama())
    TagLoops()(graph_module)
    assert Program(graph_module).loops.describe() == "no loop"
