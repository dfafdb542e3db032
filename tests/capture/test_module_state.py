"""What a model keeps between calls: it does not hide from capture how it is computed, and is left unchanged."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from loopq_compile import CaptureError
from tests.small_models import Small, captured, ids, same

TABLES: dict[Any, Tensor] = {}


def table(length: int) -> Tensor:
    return torch.sin(torch.arange(length)[:, None] * torch.linspace(0, 1, 16))


@functools.lru_cache
def remembered(length: int) -> Tensor:
    return table(length)


def grown(self: Small, n: int) -> Tensor:
    if self.cache is None or self.cache.shape[0] < n:
        self.cache = table(n)
    return self.cache[:n]


def of_one_length(self: Small, n: int) -> Tensor:
    if self.length != n:
        self.length, self.cache = n, table(n)[None]
    return self.cache


def of_a_pair(self: Small, n: int) -> Tensor:
    if self.pair[0] != n:
        self.pair = (n, table(n))
    return self.pair[1]


def of_a_dict(self: Small, n: int) -> Tensor:
    if (n, self.scale.dtype) not in self.tables:
        self.tables[n, self.scale.dtype] = table(n)
    return self.tables[n, self.scale.dtype]


def of_a_file(self: Small, n: int) -> Tensor:
    if n not in TABLES:
        TABLES[n] = table(n)
    return TABLES[n]


def of_a_buffer(self: Small, n: int) -> Tensor:
    if self.length != n:
        self.length = n
        self.register_buffer("kept", table(n), persistent=False)
    return self.kept


def of_lru_cache(self: Small, n: int) -> Tensor:
    return remembered(n)


def of_a_first_buffer(self: Small, n: int) -> Tensor:
    if not hasattr(self, "cos"):
        self.register_buffer("cos", table(64), persistent=False)
    return self.cos[:n]


def of_an_empty_buffer(self: Small, n: int) -> Tensor:
    if self.later is None or self.later.shape[0] != n:
        self.later = table(n)
    return self.later


CACHES = [grown, of_one_length, of_a_pair, of_a_dict, of_a_file, of_a_buffer, of_lru_cache]
CACHES += [of_a_first_buffer, of_an_empty_buffer]


class Caching(Small):
    def __init__(self, find) -> None:
        super().__init__(lambda self, x: x + find(self, x.shape[1]))
        self.cache, self.length, self.pair, self.tables = None, 0, (0, None), {}
        self.register_buffer("kept", torch.zeros(0, 16), persistent=False)
        self.register_buffer("later", None)


@pytest.mark.parametrize("warm", [None, 7], ids=["cold", "warm"])
@pytest.mark.parametrize("cache", CACHES, ids=lambda function: function.__name__)
def test_caches_of_earlier_calls_do_not_fix_the_length(cache, warm) -> None:
    TABLES.clear()
    model = Caching(cache).eval()
    if warm:
        model(ids(2, warm))
    before = (dict(vars(model)), dict(model.tables), dict(TABLES), dict(model._buffers))
    program = captured(model)
    after = (dict(vars(model)), dict(model.tables), dict(TABLES), dict(model._buffers))
    for old, new in zip(before, after, strict=True):
        assert list(old) == list(new)
        assert all(old[name] is new[name] for name in old)
    for size in ((1, 1), (2, 7), (3, 12)):
        same(program, model, ids(*size))
        assert not isinstance(model(ids(*size)), FakeTensor)


def random_buffer(self: Small, x: Tensor) -> Tensor:
    if not hasattr(self, "noise"):
        self.register_buffer("noise", torch.randn(16))
    return x + self.noise


def late_layer(self: Small, x: Tensor) -> Tensor:
    if not hasattr(self, "late"):
        self.late = torch.nn.Linear(16, 16)
    return self.late(x)


@pytest.mark.parametrize("late", [random_buffer, late_layer])
def test_a_model_whose_first_call_makes_weights_has_to_run_once(late) -> None:
    model = Small(late).eval()
    with pytest.raises(CaptureError, match=r"Run it once|draws random numbers"):
        captured(model)
    assert "late" not in model._modules
    assert "noise" not in model._buffers
    model(ids(2, 7))
    same(captured(model), model, ids(3, 4))


def test_hooks_keep_only_what_real_calls_gave_them() -> None:
    seen, model = [], Small(lambda self, x: self.linear(x))
    model.linear.register_forward_hook(lambda module, args, output: seen.append(output))
    model.norm.last = seen
    captured(model)
    assert seen == []


def test_forward_of_any_arguments() -> None:
    class Delegating(Small):
        def forward(self, *args: Tensor, **options: Tensor) -> Tensor:
            return super().forward(args[0]) * (args[1] if len(args) > 1 else 1)

    model = Delegating()
    same(captured(model, ids(2, 7)), model, ids(3, 4))
    same(captured(model, (ids(2, 7), torch.rand(2, 7, 1))), model, ids(3, 4), torch.rand(3, 4, 1))


def test_a_weight_that_is_rewritten_is_refused_with_the_way_out() -> None:
    model = Small()
    model.embed.max_norm = 1.0
    with pytest.raises(Exception, match="max_norm = None"):
        captured(model)
