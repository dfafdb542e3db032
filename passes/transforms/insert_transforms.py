"""`insert-transforms`: an invertible transform before every group of quantized linears."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, fx

from loopq_compile.errors import InternalError, LoopQError, did_you_mean
from loopq_compile.graph.state import get_tensor
from loopq_compile.graph.weights import weight_chain
from loopq_compile.operators import ops
from loopq_compile.passes.base import Pass, PassResult
from loopq_compile.passes.transforms.conditioning import condition_numbers
from loopq_compile.passes.transforms.fold_diagonals import find_gain
from loopq_compile.passes.transforms.hadamard import balanced_factors, hadamard_factors, random_orthogonal
from loopq_compile.passes.transforms.tables import (
    Inverses,
    Use,
    add_table,
    group_tables,
    group_uses,
    group_width,
    insert_diagonal,
    insert_kronecker,
    reads_stream,
    table_type,
    weight_type,
)

__all__ = ["InsertTransforms", "condition_numbers"]

SMALLEST_GAIN = 1e-6
"""Gains of norms below this count as zero, since their inverse would be too large to compute with. In float16, so do
gains whose inverse float16 cannot represent."""
_CHOICES = {
    "matrix": ("kronecker", "hadamard", "full", None),
    "diagonal": (False, True, "gain"),
    "init": ("identity", "hadamard", "orthogonal"),
    "learn": ("transform", "orthogonal", None),
}


class InsertTransforms(Pass):
    """Replaces `x` by `x P`, and the weights of the linears that read it by `W P^-T` (LoopQ eq. 2 and 3).

    Before: the linears of a group read `x` and their weights. After, for every use of the group and row `t` of its
    tables (row 0 where all loops share them): the linears read `kronecker(x * diagonal[t], left[t], right[t])`, and
    `kronecker(W * (1 / diagonal[t]), left[t]^-T, right[t]^-T)`. The function stays the same. What changes is the
    input of the quantizers that later passes put after both.

    Does nothing to linears left in floating point, and to groups that already have a matrix. An existing diagonal, from
    `smooth-activations` for instance, stays before it.

    Args:
        matrix: "kronecker", two factors of nearly the same size; "hadamard", a fixed Hadamard rotation with random
            signs; "full", one matrix; None for only the diagonal.
        diagonal: also a factor per channel before the matrix, initially 1. "gain": the inverse of the gain of the norm
            that the group reads, if only this group reads it. The gain then moves into the weights, and
            `fold-diagonals` can remove it from the norm, as rotations of the residual stream require.
        init: the initial matrix.
        learn: "transform" lets calibration change matrix and diagonal; "orthogonal" only the matrix, among rotations.
        groups: names or patterns of the groups; None for all.
        per_loop: names or patterns of the groups that get a row, and a weight, for every loop.
        stream: True for only the groups that read the residual stream, False for only the others, None for all.
        shared: whether groups of the same width read one table.
        seed: seed of signs and rotations; None takes that of the options.

    Raises:
        LoopQError: an option or a pattern is unknown, or a transform cannot be inverted.
    """

    def __init__(
        self,
        matrix: str | None = "kronecker",
        diagonal: bool | str = False,
        init: str = "identity",
        learn: str | None = None,
        groups: str | Sequence[str] | None = None,
        per_loop: str | Sequence[str] | None = (),
        stream: bool | None = None,
        shared: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        given = {"matrix": matrix, "diagonal": diagonal, "init": init, "learn": learn}
        for option, value in given.items():
            if value not in _CHOICES[option]:
                raise LoopQError(f"InsertTransforms({option}={value!r}) is unknown; use one of {_CHOICES[option]}.")
        self.matrix, self.diagonal, self.learn = matrix, diagonal, learn
        self.init = "hadamard" if matrix == "hadamard" else init
        self.groups, self.per_loop, self.stream, self.shared, self.seed = groups, per_loop, stream, shared, seed

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        state = self.state(graph_module)
        uses = group_uses(graph_module)
        tables = group_tables(graph_module)
        wide = set(_matching(self.per_loop, uses))
        self._random = torch.Generator().manual_seed(state.options.seed if self.seed is None else self.seed)
        self._common: dict[int, tuple[fx.Node, fx.Node]] = {}
        self._inverses: dict[fx.Node, Inverses] = {}
        changed = 0
        for group in _matching(self.groups, uses):
            rows = max(state.loops.iterations(use.tag) for use in uses[group]) if group in wide else 1
            if _is_transformed(uses[group][0]) or self.stream not in (None, reads_stream(uses[group][0])):
                continue
            inserted = False
            if self.diagonal and "diagonal" not in tables.get(group, {}):
                inserted = self._add_diagonal(graph_module, group, uses[group], rows)
            if self.matrix:
                self._add_matrix(graph_module, group, uses[group], rows)
            changed += inserted or self.matrix is not None
        if changed:
            worst = max(condition_numbers(graph_module).values(), default=1.0)
            state.note(f"{changed} groups, {self.matrix or 'diagonal'}; condition numbers up to {worst:.3g}")
        return PassResult(graph_module, bool(changed))

    def _add_diagonal(self, graph_module: fx.GraphModule, group: str, uses: list[Use], rows: int) -> bool:
        width = group_width(graph_module, uses)
        values = torch.ones(width, dtype=table_type(graph_module, uses))
        if self.diagonal == "gain":
            gain = find_gain(graph_module, {use.x: set(use.linears) for use in uses})
            if isinstance(gain, str):
                return False
            # A channel whose gain is zero carries no signal; any factor will do.
            stored = get_tensor(graph_module, gain.weight).detach().to("cpu", values.dtype)
            smallest = max(SMALLEST_GAIN, 2 / torch.finfo(weight_type(graph_module, uses)).max)
            values = torch.where(stored.abs() > smallest, 1 / stored, values)
        _check_order(group, uses)
        learn = "diagonal" if self.learn == "transform" else None
        table = add_table(graph_module, group, "diagonal", values.repeat(rows, 1), learn)
        insert_diagonal(graph_module, group, uses, table)
        return True

    def _add_matrix(self, graph_module: fx.GraphModule, group: str, uses: list[Use], rows: int) -> None:
        _check_order(group, uses)
        width = group_width(graph_module, uses)
        if not self.shared:
            factors = self._tables(graph_module, group, width, rows, table_type(graph_module, uses))
        elif width in self._common:
            factors = self._common[width]
        else:
            name, dtype = f"width_{width}", table_type(graph_module, uses)
            factors = self._common[width] = self._tables(graph_module, name, width, rows, dtype)
        insert_kronecker(graph_module, group, uses, *factors, self._inverses.setdefault(factors[0], {}))

    def _tables(
        self, graph_module: fx.GraphModule, name: str, width: int, rows: int, dtype: torch.dtype
    ) -> tuple[fx.Node, fx.Node]:
        left, right = self._start(width)
        tables = [factor.to(dtype).repeat(rows, 1, 1) for factor in (left, right)]
        learn = None if self.matrix == "hadamard" else self.learn
        return (
            add_table(graph_module, name, "left", tables[0], learn),
            add_table(graph_module, name, "right", tables[1], None if self.matrix == "full" else learn),
        )

    def _start(self, width: int) -> tuple[Tensor, Tensor]:
        """Initial left and right factor."""
        sizes = (width, 1) if self.matrix == "full" else balanced_factors(width)
        if self.init == "identity":
            return torch.eye(sizes[0]), torch.eye(sizes[1])
        if self.init == "orthogonal":
            left = random_orthogonal(sizes[0], self._random)
            return left, torch.eye(1) if sizes[1] == 1 else random_orthogonal(sizes[1], self._random)
        left, right = hadamard_factors(width, self._random)
        return (torch.kron(left, right), torch.eye(1)) if self.matrix == "full" else (left, right)


def _is_transformed(use: Use) -> bool:
    x = use.x
    while x.target in (ops.dequantize.default, ops.quantize.default):
        x = x.args[0]  # type: ignore[assignment]
    return x.target is ops.kronecker.default


def _check_order(group: str, uses: list[Use]) -> None:
    if any(node.target is ops.dequantize.default for node in weight_chain(uses[0].linears[0])):
        raise InternalError(f"insert-transforms must come before quantize-weights; {group!r} is quantized already.")


def _matching(patterns: str | Sequence[str] | None, groups: Iterable[str]) -> list[str]:
    """The groups that the patterns match, in the order of `groups`."""
    names = list(groups)
    if patterns is None:
        return names
    chosen: set[str] = set()
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        found = [name for name in names if fnmatchcase(name, pattern)]
        if not found:
            raise LoopQError(f"InsertTransforms: no group is called {pattern!r}.{did_you_mean(pattern, names)}")
        chosen.update(found)
    return [name for name in names if name in chosen]
