"""Branches on sizes stay with the program: every call, saved program and ONNX file is checked."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import loopq_compile as lq
from loopq_compile import CaptureError, LoopQError
from loopq_compile.graph.conditions import evaluate
from loopq_compile.graph.signature import signature_from_dict, signature_to_dict
from loopq_compile.graph.state import get_state
from tests.small_models import Small, captured, ids, same


def longer(self: Small, x: Tensor) -> Tensor:
    if x.shape[1] > 16:
        x = x * 2
    return x


def largest(self: Small, x: Tensor) -> Tensor:
    return x.topk(max(1, int(0.67 * x.shape[1])), 1).values


def odd(self: Small, x: Tensor) -> Tensor:
    return x * 2 if x.shape[1] % 2 else x


def single(self: Small, x: Tensor) -> Tensor:
    return x * 2 if x.shape[1] == 1 else x


def one_row(self: Small, x: Tensor) -> Tensor:
    return x * 2 if x.shape[0] == 1 else x


def chunked(self: Small, x: Tensor) -> Tensor:
    return torch.stack([part.sum(1) for part in x.split(4, 1)], 1)


BRANCHES: dict[str, tuple[Callable, str, list[tuple[int, int]], list[tuple[int, int]]]] = {
    "a longest length": (longer, "sequence <= 16", [(2, 16), (1, 1)], [(2, 17), (2, 40)]),
    "a share of the length": (largest, "float(sequence)", [(3, 11)], [(2, 12), (2, 1)]),
    "odd lengths": (odd, "sequence % 2 != 0", [(2, 1), (2, 13)], [(2, 12), (2, 40)]),
    "one token": (single, "sequence != 1", [(1, 2), (2, 40)], [(2, 1)]),
    "one row": (one_row, "batch != 1", [(3, 1)], [(1, 5)]),
    "the number of chunks": (chunked, "// 4 == 3", [(2, 12), (2, 9)], [(2, 13), (2, 8)]),
}


@pytest.mark.parametrize("kind", BRANCHES)
def test_a_program_refuses_sizes_at_which_the_model_takes_another_way(kind: str) -> None:
    function, condition, right, wrong = BRANCHES[kind]
    model = Small(function)
    program = captured(model, ids(2, 11))
    for size in right:
        same(program, model, ids(*size))
    signature = get_state(program.graph_module).signature
    program.graph_module.meta["loopq"].signature = signature_from_dict(signature_to_dict(signature))
    for size in wrong:
        with pytest.raises(LoopQError, match="takes another way where") as error:
            program(ids(*size))
        assert condition in str(error.value)
        assert "test_sizes.py" in str(error.value)


HARMLESS = {
    "the last tokens": lambda self, x: x[:, -8:],
    "padding to whole chunks": lambda self, x: torch.nn.functional.pad(x, (0, 0, 0, -x.shape[1] % 4)),
    "no mask for one token": lambda self, x: x if x.shape[1] == 1 else x + 0,
    "at most so many": lambda self, x: x[:, : min(8, x.shape[1])],
}


@pytest.mark.parametrize("kind", HARMLESS)
def test_branches_that_change_nothing_are_not_in_the_way(kind: str) -> None:
    model = Small(HARMLESS[kind])
    program = captured(model, ids(2, 11))
    for size in ((1, 1), (2, 8), (3, 12), (2, 40)):
        same(program, model, ids(*size))
    assert not get_state(program.graph_module).signature.conditions


def test_a_size_that_becomes_a_plain_number_is_refused_with_its_line() -> None:
    import math

    with pytest.raises(CaptureError, match=r"math\.log"):
        captured(Small(lambda self, x: x * math.log(x.shape[1])), ids(2, 11))


@pytest.mark.parametrize(
    "text", ["__import__('os')", "x.y", "9 ** 999", "(lambda: 1)()", "open('f')", "[1]", "'a'", "-" * 5000]
)
def test_a_condition_of_a_file_is_arithmetic_and_nothing_else(text: str) -> None:
    with pytest.raises(LoopQError):
        evaluate(text, {"sequence": 3})


def test_saved_programs_and_onnx_files_check_sizes(tmp_path) -> None:
    model = Small(lambda self, x: longer(self, self.linear(x)))
    program = lq.compile(model, ids(2, 11), scheme=lq.Scheme(4, 16, group_size=16), method="symmetric")
    program.save(tmp_path / "program")
    file = program.export_onnx(tmp_path / "onnx").path
    from loopq_compile.backends.onnx import OnnxExecutable

    for run in (lq.load(tmp_path / "program"), OnnxExecutable(file, threads=1)):
        torch.testing.assert_close(run(ids(2, 9)), program(ids(2, 9)), rtol=1e-3, atol=1e-3)
        with pytest.raises(LoopQError, match="sequence <= 16"):
            run(ids(2, 17))


class Scored(Small):
    """A model that returns its loss if it is given targets."""

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        logits = self.lm_head(self.linear(self.embed(idx)))
        return logits, None if targets is None else self.function(logits, targets)


def all_tokens(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


def next_tokens(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].reshape(-1, 64), targets.reshape(-1))


def transposed(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), targets)


def gathered(logits: Tensor, targets: Tensor) -> Tensor:
    return -logits[:, :-1].log_softmax(-1).gather(-1, targets[..., None]).mean()


LOSSES = [(all_tokens, 0), (next_tokens, 1), (transposed, 1), (gathered, 1), (all_tokens, None)]


@pytest.mark.parametrize(("loss", "fewer"), LOSSES, ids=["all", "next", "transposed", "gathered", "flattened"])
def test_targets_are_inputs_whose_length_follows_from_the_tokens(loss, fewer, tmp_path) -> None:
    def example(batch: int, length: int) -> tuple[Tensor, Tensor]:
        tokens, targets = ids(batch, length), ids(batch, length).flip(1)
        return tokens, targets.reshape(-1) if fewer is None else targets[:, fewer:]

    model = Scored(loss).eval()
    program = lq.compile(model, example(2, 11), scheme=lq.Scheme(8, 16, group_size=16), method="symmetric")
    program.save(tmp_path / "program")
    for run in (program, lq.load(tmp_path / "program")):
        for size in ((2, 11), (3, 20), (1, 2)):
            torch.testing.assert_close(run(*example(*size))[1], model(*example(*size))[1], rtol=1e-2, atol=1e-2)
        if loss is not gathered:  # which takes any part of the targets
            with pytest.raises(LoopQError, match=r"disagree on 'sequence'|do not fit together"):
                run(example(2, 9)[0], example(2, 7)[1])
