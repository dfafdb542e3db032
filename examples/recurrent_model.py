"""A depth-recurrent language model in a Hugging Face folder: what `train_recurrent.py` trains.

It has what the depth-recurrent records of the parameter-golf challenge have: narrow layers of which some run several
times, the embedding mixed into every layer (`x0`), and U-Net skips from the first half of all visits to the second.
This file is copied into the folder, and read from there with `trust_remote_code=True`.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class RecurrentConfig(PretrainedConfig):
    """Sizes.

    Args:
        vocab_size: tokens.
        hidden_size: width of the residual stream.
        num_attention_heads, num_key_value_heads: heads of `hidden_size / num_attention_heads` channels.
        num_hidden_layers: layers with weights of their own.
        first_looped, last_looped: the layers that run again, counted from 0, both included.
        loops: how often they run.
    """

    model_type = "loopq_recurrent"

    def __init__(
        self,
        vocab_size: int = 2048,
        hidden_size: int = 256,
        num_attention_heads: int = 8,
        num_key_value_heads: int = 4,
        num_hidden_layers: int = 11,
        first_looped: int = 4,
        last_looped: int = 6,
        loops: int = 3,
        **options,
    ) -> None:
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_attention_heads, self.num_key_value_heads = num_attention_heads, num_key_value_heads
        self.num_hidden_layers = num_hidden_layers
        self.first_looped, self.last_looped, self.loops = first_looped, last_looped, loops
        super().__init__(**options)

    def visits(self) -> list[int]:
        """The layers in the order in which they run."""
        looped = [*range(self.first_looped, self.last_looped + 1)] * self.loops
        return [*range(self.first_looped), *looped, *range(self.last_looped + 1, self.num_hidden_layers)]


def unit(x: torch.Tensor) -> torch.Tensor:
    """RMS norm without a gain."""
    return F.rms_norm(x, x.shape[-1:])


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions for `[batch, length, heads, size]`."""
    half = x.shape[-1] // 2
    speeds = 10_000.0 ** (-torch.arange(half, device=x.device) / half)
    angles = torch.arange(x.shape[1], device=x.device)[:, None, None] * speeds
    cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], -1)


class Layer(nn.Module):
    """Mixes the embedding `x0` into the state, then attention and a squared MLP, each scaled channel by channel."""

    def __init__(self, config: RecurrentConfig) -> None:
        super().__init__()
        width, self.heads, self.key_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.size = width // self.heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, self.key_heads * self.size, bias=False)
        self.value = nn.Linear(width, self.key_heads * self.size, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 3 * width, bias=False), nn.Linear(3 * width, width, bias=False)
        self.gain = nn.Parameter(torch.full((self.heads, 1), 1.5))
        self.mix = nn.Parameter(torch.tensor([[1.0], [0.1]]).expand(2, width).clone())
        self.scales = nn.Parameter(torch.ones(2, width))

    def forward(self, x: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
        x = self.mix[0] * x + self.mix[1] * x0
        x = x + self.scales[0] * self._attend(unit(x))
        return x + self.scales[1] * self.down(F.relu(self.up(unit(x))).square())

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.query(x), self.key(x), self.value(x)
        query = rotate(unit(query.unflatten(-1, (self.heads, self.size)))) * self.gain
        key = rotate(unit(key.unflatten(-1, (self.key_heads, self.size))))
        heads = [part.transpose(1, 2) for part in (query, key, value.unflatten(-1, (self.key_heads, self.size)))]
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class RecurrentForCausalLM(PreTrainedModel, GenerationMixin):
    """Layers in the order of `RecurrentConfig.visits`, a tied head, and capped logits."""

    config_class = RecurrentConfig

    def __init__(self, config: RecurrentConfig) -> None:
        super().__init__(config)
        self.order = config.visits()
        half = len(self.order) // 2
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.skips = nn.Parameter(torch.full((half, config.hidden_size), 0.5))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5 / 2)

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False, **_) -> CausalLMOutput:
        x = x0 = unit(self.embed(input_ids))
        half, kept = len(self.skips), []
        for index in self.order[:half]:
            x = self.layers[index](x, x0)
            kept.append(x)
        for at, index in enumerate(self.order[half:]):
            x = x + self.skips[at] * kept.pop() if kept else x
            x = self.layers[index](x, x0)
        return CausalLMOutput(logits=30.0 * torch.tanh(F.linear(unit(x), self.embed.weight) / 30.0))


RecurrentConfig.register_for_auto_class()
RecurrentForCausalLM.register_for_auto_class("AutoModelForCausalLM")
