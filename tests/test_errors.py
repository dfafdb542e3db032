"""Bad input of many kinds: each ends in a `LoopQError` that says what is wrong, where, and what to do."""

import pytest
import torch
from torch import nn

import loopq_compile as lq
from tests.tiny import VOCABULARY, TinyLoopedLM, tiny_model, tiny_program, tokens

DATA = [tokens(1)]


def compiled(model=None, example=None, **options):
    options = {"scheme": "w4a4", "method": "symmetric"} | options
    return lq.compile(model or tiny_model(), tokens() if example is None else example, **options)


def changed(change):
    torch.manual_seed(0)
    model = TinyLoopedLM()
    change(model)
    return model


def set_nan(model):
    with torch.no_grad():
        model.layers[0].down.weight[3, 5] = float("nan")


def set_infinite(model):
    with torch.no_grad():
        model.embed.weight[0, 0] = float("inf")


class Branching(nn.Module):
    """Stops looping when the state is small: control flow that depends on data."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        for _ in range(3):
            if x.abs().mean() < 0.1:
                break
            x = self.layer(x)
        return x


class FixedBatch(nn.Module):
    """Reshapes to the current batch size."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x):
        return self.layer(x).view(2, -1)


class Recorder(nn.Module):
    """Stores its input in a buffer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(32, 32)
        self.register_buffer("seen", torch.zeros(32))

    def forward(self, x):
        self.seen.add_(x.detach().mean((0, 1)))
        return self.layer(x)


class NoLinear(nn.Module):
    """Has nothing to quantize."""

    def forward(self, x):
        return x.softmax(-1)


class Exploding(nn.Module):
    """Overflows in its second layer on ordinary input."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return self.second((self.first(x) * 1e4).exp())


def broken_loader():
    yield tokens()
    raise OSError("disk on fire")


FLOATS = torch.randn(2, 5, 32)

CASES = {
    # the model
    "a name in place of a model": (lambda: lq.compile("ByteDance/Ouro-1.4B"), "must be a torch.nn.Module; got str"),
    "a function in place of a model": (lambda: lq.compile(torch.relu, FLOATS), "must be a torch.nn.Module"),
    "NaN weights": (lambda: compiled(changed(set_nan)), r"'layers.0.down.weight' contains NaN"),
    "infinite weights": (lambda: compiled(changed(set_infinite)), "'embed.weight' contains NaN or infinite"),
    "weights on the meta device": (lambda: compiled(TinyLoopedLM().to("meta")), "load the checkpoint first"),
    "control flow that depends on data": (
        lambda: compiled(Branching(), torch.randn(4, 8), group_size=8),
        r"test_errors.py:\d+ in forward: if x.abs\(\).mean\(\) < 0.1.*\n.*torch.where",
    ),
    "a fixed batch size": (lambda: compiled(FixedBatch(), FLOATS), r"test_errors.py:\d+(.|\n)*x.shape"),
    "state kept in a buffer": (lambda: compiled(Recorder(), FLOATS), "writes to its buffer 'seen'"),
    "nothing to quantize": (lambda: compiled(NoLinear(), FLOATS), "nothing to quantize in NoLinear"),
    "activations that overflow": (
        lambda: compiled(Exploding(), FLOATS, calibration=[FLOATS], activation="static"),
        "The input of 'second'.*NaN or infinite",
    ),
    "a class in place of a model": (lambda: compiled(TinyLoopedLM), r"write TinyLoopedLM\(...\)"),
    "a wrapped model": (lambda: compiled(nn.DataParallel(tiny_model())), "pass model.module"),
    # example inputs
    "no example inputs": (lambda: lq.compile(tiny_model(), scheme="w4a16"), "give example_inputs"),
    "an example of another type": (lambda: compiled(example="text"), "must be a tensor, a tuple or a dict"),
    "an example without a tensor": (lambda: compiled(example=(3,)), "holds no tensor"),
    "an example with an unknown name": (lambda: compiled(example={"ids": tokens()}), "has no argument 'ids'"),
    "too many example inputs": (lambda: compiled(example=(tokens(), tokens())), "2 example inputs"),
    "an example without a batch": (lambda: compiled(example=tokens()[0]), r"x.unsqueeze\(0\)"),
    "an empty example": (lambda: compiled(example=tokens()[:, :0]), "'input_ids' is empty"),
    "a list of lists as example": (lambda: compiled(example=([[1, 2]],)), "got list"),
    # scheme and method
    "an unknown scheme": (lambda: compiled(scheme="w4b4"), "Unknown scheme 'w4b4'"),
    "a scheme of the wrong type": (lambda: compiled(scheme=4), "must be a name such as 'w4a4'"),
    "too few bits": (lambda: compiled(scheme="w1a4"), "weight_bits must be an integer out of 2, 3"),
    "an unknown scheme field": (lambda: compiled(groupsize=32), "Did you mean 'group_size'"),
    "a group size that does not divide": (
        lambda: compiled(group_size=48),
        r"group_size=48 does not divide the 64 inputs",
    ),
    "a pattern that matches nothing": (lambda: compiled(skip=("*.dwon",)), r"Did you mean 'down'"),
    "patterns that are no text": (lambda: compiled(skip=(3,)), "takes a sequence of patterns"),
    "no patterns at all": (lambda: compiled(skip=None), "takes a sequence of patterns; got None"),
    "no steps": (lambda: compiled(steps=0), "steps must be an integer of at least 1"),
    "an unknown weight solver": (lambda: compiled(weight_solver="gpqt"), "Did you mean 'gptq'"),
    "everything skipped": (lambda: compiled(skip=("*",)), "nothing to quantize"),
    "an unknown method": (lambda: compiled(method="symetric"), "Did you mean 'symmetric'"),
    "a method of the wrong type": (lambda: compiled(method=3), "must be a name or a loopq_compile.Pipeline"),
    # calibration data
    "calibration data missing": (lambda: compiled(method="las"), "needs calibration data"),
    "static ranges without data": (lambda: compiled(activation="static"), "needs calibration data"),
    "empty calibration data": (lambda: compiled(calibration=[]), "calibration is empty"),
    "an iterator already used up": (lambda: compiled(calibration=iter(())), "an iterator can be used only once"),
    "a single tensor": (lambda: compiled(calibration=tokens()), r"wrap a single tensor in a list: \[tensor\]"),
    "raw text": (lambda: compiled(calibration="some text"), "Tokenize text first"),
    "a batch of text": (lambda: compiled(calibration=["text"]), "Calibration batch 0: .*must be a tensor"),
    "a batch of another rank": (
        lambda: compiled(calibration=[tokens(), tokens()[0]]),
        r"Calibration batch 1: .*shape \[16\].*Add a batch dimension",
    ),
    "a batch of floats": (lambda: compiled(calibration=[tokens().float()]), "Calibration batch 0: .*torch.float32"),
    "tokens beyond the vocabulary": (
        lambda: compiled(calibration=[tokens() + VOCABULARY]),
        "the model's vocabulary from 0 to 63",
    ),
    "a batch with the wrong names": (lambda: compiled(calibration=[{"ids": tokens()}]), "unknown input 'ids'"),
    "NaN activations as data": (
        lambda: compiled(nn.Sequential(nn.Linear(32, 32)), FLOATS, calibration=[FLOATS / 0 * 0]),
        "Calibration batch 0: .*NaN",
    ),
    "data that fails on its way": (lambda: compiled(calibration=broken_loader()), "failed at batch 1: OSError: disk"),
    "a batch with an unknown name": (
        lambda: compiled(calibration=[{"input_ids": tokens(), "inputs_id": 3}]),
        "unknown input 'inputs_id'. Did you mean 'input_ids'",
    ),
    "padding that the program does not see": (
        lambda: compiled(calibration=[{"input_ids": tokens(), "attention_mask": torch.zeros(2, 16)}]),
        "captured without it",
    ),
    "a batch of lists": (lambda: compiled(calibration=[[1, 2, 3]]), "Calibration batch 0: .*must be a tensor"),
    # calling and generating
    "a token beyond the vocabulary": (lambda: tiny_program()(tokens() + 5000), "out of range"),
    "a temperature that is no number": (lambda: tiny_program().generate(tokens(), temperature="1"), "must be a number"),
    "a temperature of NaN": (lambda: tiny_program().generate(tokens(), temperature=float("nan")), "must be positive"),
    "a call without inputs": (lambda: tiny_program()(), "'input_ids' is missing"),
    "a call with an unknown name": (lambda: tiny_program()(input_id=tokens()), "Did you mean 'input_ids'"),
    "a call with too many inputs": (lambda: tiny_program()(tokens(), tokens()), "Got 2 positional arguments"),
    "a call with an argument twice": (lambda: tiny_program()(tokens(), input_ids=tokens()), "given twice"),
    "a call with floats": (lambda: tiny_program()(tokens().float()), "has type torch.float32"),
    "a call without a batch": (lambda: tiny_program()(tokens()[0]), "Add a batch dimension"),
    "a call with nothing": (lambda: tiny_program()(tokens()[:0]), "is empty"),
    "no tokens to continue": (lambda: tiny_program().generate(tokens()[:, :0]), "at least one token"),
    "no tokens to add": (lambda: tiny_program().generate(tokens(), 0), "max_new_tokens must be at least 1"),
    "temperature zero": (lambda: tiny_program().generate(tokens(), temperature=0), "temperature must be positive"),
    "top_p above one": (lambda: tiny_program().generate(tokens(), top_p=1.5), "top_p must lie in"),
    "top_k zero": (lambda: tiny_program().generate(tokens(), top_k=0), "top_k must be at least 1"),
    # output
    "an unknown backend": (lambda: tiny_program().lower("onxx"), "Did you mean 'onnx'"),
    "an unknown target": (lambda: tiny_program().export_onnx("unused", target="qqd"), "qqd"),
    "an unknown form": (lambda: tiny_program().export_onnx("unused", form="scrolled"), "scrolled"),
    "a folder that cannot be made": (lambda: tiny_program().save("/proc/no/such"), "Cannot write"),
    "a folder that is a file": (lambda: tiny_program().save(__file__), "is a file"),
    "loading what is not there": (lambda: lq.load("/nowhere"), "not a saved program"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_ends_in_a_clear_error(case):
    act, says = CASES[case]
    with pytest.raises(lq.LoopQError, match=says) as caught:
        act()
    assert len(str(caught.value)) < 1500, "an error is read by a person"
