"""A small model with a place for one feature, one with masks, and shortcuts, for tests of capture."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loopq_compile.capture.to_graph import capture
from loopq_compile.program import Program

IDS = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(0))


class Small(nn.Module):
    """Embedding, `function(self, x, *inputs)`, head."""

    def __init__(self, function: Callable[..., Any] = lambda self, x: x) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.linear, self.lm_head = nn.Embedding(64, 16), nn.Linear(16, 16), nn.Linear(16, 64)
        self.norm, self.drop = nn.LayerNorm(16), nn.Dropout(0.5)
        self.register_buffer("scale", torch.full((16,), 2.0))
        self.function = function

    def forward(self, input_ids: Tensor) -> Any:
        return self.lm_head(self.function(self, self.embed(input_ids)))


def captured(model: nn.Module, example: Any = IDS) -> Program:
    return Program(capture(model, example))


def same(program: Program, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    training = model.training
    model.eval()
    with torch.no_grad():
        expected = model(*args, **kwargs)
    model.train(training)
    torch.testing.assert_close(program(*args, **kwargs), expected, rtol=1e-5, atol=1e-5)


class Masked(nn.Module):
    """Token ids, a mask in any of the usual shapes, a flag, and a keyword-only factor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qk = nn.Embedding(64, 16), nn.Linear(16, 16)

    def forward(
        self,
        input_ids: Tensor,
        mask: Tensor | None = None,
        double: bool = False,
        *,
        factor: float | Tensor = 1.0,
    ) -> Tensor:
        x = self.embed(input_ids)
        q = self.qk(x).unsqueeze(1)
        if mask is not None and mask.ndim == 2:
            mask = mask[:, None, None, :] != 0
        x = F.scaled_dot_product_attention(q, q, x.unsqueeze(1), attn_mask=mask).squeeze(1)
        return x * (2 if double else 1) * factor


def padding(batch: int, length: int) -> Tensor:
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[:, length // 2 + 1 :] = 0
    return mask


def additive(batch: int, length: int) -> Tensor:
    return torch.full((length, length), -1e9).triu(1).expand(batch, 1, length, length).contiguous()


def ids(batch: int, length: int) -> Tensor:
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(batch * length))
