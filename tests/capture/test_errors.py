"""What cannot be captured, and calls that do not fit, end in an error that says where and what to do."""

import pytest
from torch import Tensor, nn

from loopq_compile import CaptureError, LoopQError
from loopq_compile.capture.to_graph import capture
from tests.small_models import IDS, Masked, Small, captured, padding


class Unregistered:
    """An output class that the exporter does not know."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Returning(Small):
    def forward(self, input_ids: Tensor) -> Unregistered:
        return Unregistered(self.embed(input_ids))


def item_loop(self: Small, x: Tensor) -> Tensor:
    for _ in range(int(x.sum().item())):
        x = self.linear(x)
    return x


def early_exit(self: Small, x: Tensor) -> Tensor:
    for _ in range(3):
        x = self.linear(x)
        if x.mean() > 0.5:  # early exit
            break
    return x


class Counter(Small):
    """Counts its calls in a buffer."""

    def forward(self, input_ids: Tensor) -> Tensor:
        self.scale.add_(1)
        return self.embed(input_ids) * self.scale


REFUSED = {
    "a branch on a value": (Small(early_exit), "if x.mean() > 0.5:  # early exit", "run all loops and keep the gate"),
    "a loop on a value": (Small(item_loop), "range(int(x.sum().item()))", "fix the number of loops"),
    "a fixed batch": (Small(lambda self, x: x.reshape(2, -1, 16)), "fixes the batch size", "Use x.shape instead"),
    "a fixed length": (Small(lambda self, x: x.reshape(-1, 7, 16)), "fixes the batch size or sequence", "x.reshape"),
    "state in a buffer": (Counter(), "writes to its buffer 'scale'", "Return the value instead"),
    "a wrong shape": (Small(lambda self, x: self.linear(x[..., :3])), "self.linear(x[..., :3])", "itself runs"),
    "a type error": (Small(lambda self, x: self.linear(x, x, x)), "self.linear(x, x, x)", "itself runs"),
    "an unknown output class": (Returning(), "Unregistered", "torch.export.register_dataclass"),
    "an unknown attribute": (Small(lambda self, x: self.lienar(x)), "self.lienar(x)", "lienar"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_captured_is_refused_with_line_and_way_out(kind):
    model, line, way_out = REFUSED[kind]
    with pytest.raises(CaptureError) as error:
        captured(model)
    assert line in str(error.value)
    assert way_out in str(error.value)


def damaged(value: float) -> nn.Module:
    model = Small()
    model.linear.weight.data[0, 0] = value
    return model


BAD = {
    "no module": (lambda: capture("gpt2"), "must be a torch.nn.Module; got str"),
    "meta device": (lambda: captured(Small().to("meta")), "meta device"),
    "NaN": (lambda: captured(damaged(float("nan"))), "'linear.weight' contains NaN"),
    "infinity": (lambda: captured(damaged(float("inf"))), "'linear.weight' contains NaN or infinite"),
    "no inputs": (lambda: captured(Small(), None), "give example_inputs"),
    "an unknown keyword": (lambda: captured(Small(), {"ids": IDS}), "no argument 'ids'"),
    "too many": (lambda: captured(Small(), (IDS, IDS)), "2 example inputs"),
    "a list of numbers": (lambda: captured(Small(), {"input_ids": [1, 2]}), "must be a tensor"),
    "a set": (lambda: captured(Small(), {1, 2}), "got set"),
    "no tensor": (lambda: captured(Masked(), (None,)), "holds no tensor"),
    "an empty tensor": (lambda: captured(Small(), IDS[:0]), "is empty"),
    "no batch": (lambda: captured(Small(), IDS[0]), "unsqueeze"),
    "a missing argument": (lambda: captured(Masked(), {"mask": padding(2, 7)}), "input_ids"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_models_and_examples_are_refused(kind):
    call, message = BAD[kind]
    with pytest.raises(LoopQError, match=message):
        call()


CALLS = {
    "a constant with another value": (
        {"input_ids": IDS, "double": True},
        "'double' was captured as False, now it is True",
    ),
    "a tensor for a constant": (
        {"input_ids": IDS, "mask": padding(2, 7)},
        "'mask' was captured as None, now it is a tensor",
    ),
    "an unknown argument": ({"input_ids": IDS, "maks": None}, "no argument 'maks'. Did you mean 'mask'"),
    "a missing input": ({}, "Input 'input_ids' is missing"),
    "another type": ({"input_ids": IDS.float()}, "captured with torch.int64"),
}


@pytest.mark.parametrize("kind", CALLS)
def test_calls_that_do_not_fit_the_captured_example_are_refused(kind):
    kwargs, message = CALLS[kind]
    with pytest.raises(LoopQError, match=message):
        captured(Masked(), {"input_ids": IDS, "double": False})(**kwargs)
