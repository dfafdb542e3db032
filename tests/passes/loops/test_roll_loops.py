"""`roll-loops`: equal to the unrolled program bit by bit, for every shape of loop; and clear about what it refuses."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import loopq_compile as lq
from loopq_compile.graph.rolled import rolled_loops
from loopq_compile.graph.state import attach_state, copy_graph, get_state, set_tensor
from loopq_compile.passes.loops.roll_loops import RollLoops
from loopq_compile.pipeline import Pipeline
from loopq_compile.program import Program
from tests import zoo
from tests.tiny import tiny_program, tokens

REFUSED = {"zamba": "rms_norm_3", "two-shared": "rms_norm_5", "skip": "rms_norm"}
PEELED = {"inject-later": 1, "transition": 1}
NO_LOOP = {name for name, animal in zoo.ZOO.items() if animal.structure == "no loop"}


def rolled(program: Program) -> Program:
    copied = copy_graph(program.graph_module)
    attach_state(copied, replace(get_state(program.graph_module), log=[]))
    return Program(Pipeline([RollLoops()]).run(copied))


def same(first: object, second: object) -> bool:
    pairs = zip(pytree.tree_leaves(first), pytree.tree_leaves(second), strict=True)
    return all(a.equal(b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("name", [name for name in zoo.ZOO if name not in REFUSED and name not in NO_LOOP])
def test_every_shape_of_loop_is_equal_to_the_last_bit(name: str) -> None:
    before = zoo.tagged(name)
    after = rolled(before)
    inputs = zoo.example(zoo.model_of(name), 3, 9)
    assert same(before(*inputs), after(*inputs))
    loops = rolled_loops(after.graph_module)
    assert [loop.count + loop.skipped for loop in loops] == [loop.count for loop in before.loops.loops]
    assert loops[0].skipped == PEELED.get(name, 0)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_rolled_is_named(name: str) -> None:
    with pytest.raises(lq.LoopQError, match=rf"loop \d is not like the others: node '{REFUSED[name]}' .*unrolled"):
        rolled(zoo.tagged(name))


@pytest.mark.parametrize("name", sorted(NO_LOOP))
def test_a_program_without_loops_stays_as_it_is(name: str) -> None:
    before = zoo.tagged(name)
    after = rolled(before)
    assert len(after.graph_module.graph.nodes) == len(before.graph_module.graph.nodes)
    assert not after.log[-1].modified


@pytest.mark.parametrize("activation", ["static", "dynamic"])
def test_scales_per_loop_are_read_by_row(activation: str) -> None:
    before = tiny_program("w4a4", "las", activation)
    after = rolled(before)
    assert same(before(tokens(7, 3, 11)), after(tokens(7, 3, 11)))
    (loop,) = rolled_loops(after.graph_module)
    rows = [node for node in loop.body.graph.nodes if node.target is torch.ops.aten.select.int]
    assert len(rows) == 4 and all(row.args[2].name == "row" for row in rows)


@pytest.fixture(scope="module")
def learned() -> Program:
    """Transforms and weights per loop, and adapters that change something."""
    from tests.tiny import tiny_model

    data = [tokens(seed) for seed in range(3)]
    program = lq.compile(tiny_model(3), tokens(), scheme="w4a4", method="loopq", calibration=data, steps=2)
    tensors = dict(program.graph_module.named_buffers())
    for part in ("gain", "shift", "mix"):
        set_tensor(program.graph_module, f"adapter.0.{part}", torch.randn_like(tensors[f"adapter.0.{part}"]) / 9)
    return program


def test_adapters_transforms_and_weights_per_loop(learned: Program) -> None:
    after = rolled(learned)
    assert same(learned(tokens(7, 3, 11)), after(tokens(7, 3, 11)))
    tables = dict(after.graph_module.named_buffers())
    gate = tables["adapter.0.gate_entry"]
    assert gate.flatten().tolist()[0] == 0 and len(gate) == 3, "the first loop's row leaves the state as it is"
    stacked = [name for name in tables if name.endswith("codes_loops")]
    assert stacked and all(tables[name].shape[0] == 3 for name in stacked)


class Timed(nn.Module):
    """A block that reads the time, which begins with zero: of shape `[1]`, or `[batch]` as in LoopFormer's code."""

    def __init__(self, per_row: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.time, self.block = nn.Embedding(64, 32), nn.Linear(4, 32), nn.Linear(32, 32)
        self.per_row, self.steps = per_row, (0.5, 0.3, 0.2)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        time = torch.zeros(x.shape[0] if self.per_row else 1)
        for step in self.steps:
            angles = time[:, None] * torch.arange(1, 5)
            x = x + self.block(x * self.time(angles.cos())[:, None]).tanh()
            time = time + step
        return x


@pytest.mark.parametrize("per_row", [False, True])
def test_a_time_that_begins_with_zero_is_a_table(per_row: bool) -> None:
    """The first time is a constant, the others are sums: iterations differ only in what no input changes."""
    model = Timed(per_row)
    before = lq.compile(model, tokens(), scheme="w8a8", method="symmetric")
    after = rolled(before)
    (loop,) = rolled_loops(after.graph_module)
    assert (loop.count, loop.skipped) == (3, 0)
    assert not [node for node in loop.body.graph.nodes if node.target is torch.ops.aten.cos.default]
    for batch in (1, 3):
        assert same(before(tokens(7, batch, 9)), after(tokens(7, batch, 9)))
    model.steps, loop.count = model.steps[:2], 2
    shorter = lq.compile(model, tokens(), scheme="w8a8", method="symmetric")
    assert same(shorter(tokens()), after(tokens())), "fewer loops are a shorter schedule"


class Noisy(Timed):
    """The same with noise, which is new in every loop and call."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x, time = self.embed(input_ids), torch.zeros(1)
        for step in self.steps:
            x = x + self.block(x + self.time(torch.rand(1, 1, 4) + time)).tanh()
            time = time + step
        return x


def test_what_is_drawn_anew_is_no_table() -> None:
    after = rolled(lq.compile(Noisy(False), tokens(), scheme="w8a8", method="symmetric"))
    (loop,) = rolled_loops(after.graph_module)
    assert [node for node in loop.body.graph.nodes if node.target is torch.ops.aten.rand.default]
    assert not same(after(tokens()), after(tokens()))


def test_rows_beyond_the_last_hold(learned: Program) -> None:
    after = rolled(learned)
    (loop,) = rolled_loops(after.graph_module)
    loop.count = 2
    two = after(tokens())["logits"]
    loop.count = 5
    five = after(tokens())
    assert five["gates"].shape[-1] == 5
    assert five["logits"].isfinite().all() and not five["logits"].equal(two)


def test_a_rolled_program_prints_and_survives_saving(learned: Program, tmp_path) -> None:
    after = rolled(learned)
    text = str(after)
    assert "self.loop_0([embedding], [" in text and "def body(row, state_0, " in text
    after.save(tmp_path / "program")
    loaded = lq.load(tmp_path / "program")
    assert same(loaded(tokens(5)), after(tokens(5)))
    assert str(loaded).count("\n") == text.count("\n")


def test_a_second_run_changes_nothing() -> None:
    after = rolled(zoo.tagged("gated-stack"))
    assert not RollLoops()(after.graph_module).modified
