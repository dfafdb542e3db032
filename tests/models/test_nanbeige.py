"""Nanbeige against layers of transformers' Llama, and the configurations it reads and refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers

from loopq_compile.models import Nanbeige, NanbeigeConfig
from tests.looped_models import NANBEIGE, with_random_weights
from tests.models.test_architectures import ids


@pytest.mark.parametrize(("between", "loops"), [(True, None), (True, 3), (False, None)])
def test_it_is_a_llama_whose_layers_run_again_behind_the_norm(between: bool, loops: int | None) -> None:
    """The published parameter names are Llama's, and so is every layer."""
    config = replace(NANBEIGE, skip_loop_final_norm=not between)
    ours = with_random_weights(Nanbeige(config, loops))
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim", "rms_norm_eps")  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{name: getattr(config, name) for name in sizes}, rope_parameters=rope)
    ).eval()
    llama.load_state_dict(ours.state_dict())
    tokens = ids(2, 9)
    with torch.no_grad():
        state, norm = llama.model.embed_tokens(tokens), llama.model.norm
        llama.model.norm = norm if between else torch.nn.Identity()
        for _ in range(loops or 2):
            state = llama.model(inputs_embeds=state, use_cache=False).last_hidden_state
        state = state if between else norm(state)
        torch.testing.assert_close(ours(tokens), llama.lm_head(state), rtol=1e-4, atol=1e-4)


def test_padding_changes_no_real_token() -> None:
    model, tokens, mask = with_random_weights(Nanbeige(NANBEIGE)), ids(1, 9), torch.ones(1, 9, dtype=torch.int64)
    mask[:, :3] = 0
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, mask)[:, 3:], model(tokens[:, 3:]), rtol=1e-4, atol=1e-4)


def test_the_published_configuration_is_the_default() -> None:
    published = {
        "model_type": "nanbeige", "vocab_size": 166144, "hidden_size": 3072, "intermediate_size": 10752,
        "num_hidden_layers": 22, "num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128, "num_loops": 2,
        "skip_loop_final_norm": False, "rms_norm_eps": 1e-5, "rope_theta": 70000000, "rope_scaling": None,
        "loop_loss_weights": [], "attention_bias": False, "tie_word_embeddings": False,
    }  # fmt: skip
    assert NanbeigeConfig.from_dict(published) == NanbeigeConfig()
    with pytest.raises(ValueError, match="loop_share_kv: not part of this reference model"):
        NanbeigeConfig.from_dict({**published, "loop_share_kv": True})


@pytest.mark.parametrize(
    ("change", "message"),
    [({"num_loops": 0}, "num_loops=0"), ({"head_dim": 15}, "head_dim=15"), ({"num_key_value_heads": 3}, "multiple")],
)
def test_sizes_that_cannot_be(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(NANBEIGE, **change)
