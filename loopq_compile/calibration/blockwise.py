"""Calibration of one block against the teacher's own inputs and outputs (FlatQuant, Sun et al. 2024)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from loopq_compile.calibration import distributed
from loopq_compile.calibration.batches import token_mask
from loopq_compile.calibration.blocks import Block, Call
from loopq_compile.calibration.data import Batch
from loopq_compile.calibration.learnable import Value
from loopq_compile.calibration.objective import LossParts, distance
from loopq_compile.calibration.steps import Plan, Steps
from loopq_compile.calibration.student import Student, store_results
from loopq_compile.errors import LoopQError
from loopq_compile.graph.signature import Signature

KEPT_BYTES = 4 << 30
"""Up to this size the values of all blocks are kept at once; beyond it only those of one block, in bfloat16."""

Record = dict[str, Any]
"""Values of one batch by node name."""


class Recorder:
    """Runs the teacher over all batches and keeps what enters and leaves blocks.

    Args:
        teacher: the captured graph.
        batches: calibration batches; under `torchrun` each process keeps its rows.
        names: nodes whose values all blocks need; their size decides whether they are kept at once.
    """

    def __init__(self, teacher: fx.GraphModule, batches: Sequence[Batch], names: Iterable[str]) -> None:
        self._teacher = teacher
        rank, world = distributed.world(batches[0][0].device)
        self._batches = [distributed.shard(batch, rank, world) for batch in batches]
        self._names = tuple(names)
        first = next(self._run(self._names, False))
        size = sum(value.nbytes for value in first.values() if isinstance(value, Tensor)) * len(batches)
        self._together = size <= KEPT_BYTES
        self._kept: list[Record] | None = None

    def record(self, block: Block) -> list[Record]:
        """By batch, the values that enter and leave `block`."""
        if not self._together:
            return list(self._run(block_names([block]), True))
        if self._kept is None:
            self._kept = list(self._run(self._names, False))
        return self._kept

    def _run(self, names: tuple[str, ...], small: bool) -> Iterator[Record]:
        student = Student(self._teacher, names, recompute=False, learned=())
        for batch in self._batches:
            with torch.no_grad():
                _, known = student.run(batch, {})
            yield {name: _pack(known[name], small) for name in names}


def block_names(blocks: Iterable[Block]) -> tuple[str, ...]:
    """Names of the teacher's values that `blocks` need."""
    calls = [call for block in blocks for call in block.calls]
    return tuple(dict.fromkeys(name for call in calls for name in (*call.inputs, *call.outputs)))


@dataclass(frozen=True)
class _Packed:
    """A value stored in bfloat16; `dtype` is the type to restore."""

    value: Tensor
    dtype: torch.dtype


def _pack(value: Any, small: bool) -> Any:
    if small and isinstance(value, Tensor) and value.dtype in (torch.float32, torch.float64):
        return _Packed(value.to(torch.bfloat16), value.dtype)
    return value


class BlockTraining(Steps):
    """One block: all its runs reproduce the teacher's outputs from the teacher's inputs.

    The loss is the mean over runs and outputs of the squared error relative to the output's mean square.

    Args:
        plan: see `Steps`.
        block: what is trained.
        tensors: the stored tensors of the graph, by constant name.
        records: by batch, the teacher's values.
        signature: finds the attention mask among the inputs: masked tokens do not count.
    """

    def __init__(
        self,
        plan: Plan,
        block: Block,
        tensors: Mapping[str, Tensor],
        records: Sequence[Record],
        signature: Signature,
    ) -> None:
        super().__init__(plan)
        self.block, self.tensors, self.records = block, tensors, records
        self._masks = [token_mask(signature, distributed.shard(x, self.rank, self.world)) for x in self.batches]

    def backward(self, number: int) -> LossParts:
        """Runs backward one run at a time, so that the memory of a step does not grow with the number of loops."""
        with torch.enable_grad(), self.precision():
            constants = self._constants(self.values())
            learned = {
                name: value for name, value in constants.items() if isinstance(value, Tensor) and value.requires_grad
            }
            leaves = {name: value.detach().requires_grad_() for name, value in learned.items()}
            total = torch.zeros((), device=self.batches[0][0].device)
            for call in self.block.calls:
                loss = self._loss(call, constants | leaves, number) / len(self.block.calls)
                if loss.requires_grad:
                    loss.backward()
                total = total + loss.detach()
        used = [name for name, leaf in leaves.items() if leaf.grad is not None]
        torch.autograd.backward([learned[name] for name in used], [leaves[name].grad for name in used])
        return LossParts(total, total, torch.zeros(()), torch.zeros(()))

    def validate(self, values: Mapping[str, Value]) -> float:
        losses = []
        with torch.no_grad(), self.precision():
            constants = self._constants(values)
            for number in self.held:
                losses += [self._loss(call, constants, number) for call in self.block.calls]
        return float(distributed.mean_of(torch.stack(losses).mean()))

    def _constants(self, values: Mapping[str, Value]) -> dict[str, Any]:
        """All constant nodes that the block reads, by name."""
        known: dict[str, Any] = {}
        for name, target in self.block.attributes.items():
            known[name] = values.get(target, self.tensors[target])
        prepare = self.block.prepare
        store_results(known, prepare, prepare.module(*[known[name] for name in prepare.inputs]))
        return known

    def _loss(self, call: Call, constants: Mapping[str, Any], number: int) -> Tensor:
        record = self.records[number]
        inputs = (_unpack(record[name]) if name in call.inputs else constants[name] for name in call.segment.inputs)
        outputs = call.segment.module(*inputs)
        pairs = zip(outputs, call.outputs, strict=True)
        return torch.stack([distance(x, _unpack(record[name]), self._masks[number]) for x, name in pairs]).mean()


def _unpack(value: Any) -> Any:
    return value.value.to(value.dtype) if isinstance(value, _Packed) else value


def check_finite(records: Sequence[Record], names: Iterable[str]) -> None:
    """Refuses records that nothing can be learned from.

    Raises:
        LoopQError: the model in full precision gives NaN or infinite values at one of `names`.
    """
    for number, record in enumerate(records):
        for name in names:
            if not torch.isfinite(_unpack(record[name])).all():
                raise LoopQError(
                    f"Calibration batch {number}: node {name!r} of the model in full precision is NaN or infinite. "
                    "Look for damaged weights, or inputs outside of what the model can take."
                )
