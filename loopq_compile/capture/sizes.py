"""Decisions that a model takes by size while it is captured, and which of them a program has to check."""

from __future__ import annotations

import ast
import contextlib
import itertools
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean, BooleanAtom
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.printers import PythonPrinter

from loopq_compile.capture.errors import model_frames
from loopq_compile.errors import CaptureError, LoopQError
from loopq_compile.graph.conditions import SizeCondition

_PYTORCH = os.path.dirname(torch.__file__)
_SYMBOLIC = ("torch/__init__.py", "sym_node.py", "symbolic_shapes.py", "recording.py")
"""Endings of the names of PyTorch's files that carry out a model's comparison of sizes."""
_LARGE = (1 << 14, (1 << 14) + 1, (1 << 14) + 2, (1 << 14) + 3)
"""Lengths that represent all large ones: consecutive, since a condition may depend on remainders."""


@dataclass
class Decision:
    """A condition that was decided with the example's sizes.

    Args:
        env: the exporter's shapes.
        expression: what holds on the branch that was taken.
        place: the model's line.
        by_model: whether the model's own code decided, not PyTorch's.
    """

    env: ShapeEnv
    expression: sympy.Basic
    place: str
    by_model: bool


@dataclass
class Watch:
    """What was seen while the exporter ran: lines that fixed a size, and decisions by sizes."""

    fixed_at: list[traceback.FrameSummary] = field(default_factory=list)
    decisions: dict[Any, Decision] = field(default_factory=dict)

    def decided(self, env: ShapeEnv, expression: Any, result: Any) -> None:
        """Records that `expression` was found to be `result`, if it depends on sizes and matters for the graph.

        Comparisons inside PyTorch do not matter: they concern memory layout, or are repeated when the operator runs.
        Sizes that it turns into plain numbers (the chunks of a split) and bounds of slices do: they are in the graph.
        """
        if not getattr(expression, "free_symbols", None):
            return
        frame: Any = sys._getframe(2)
        while frame is not None and _is_symbolic(frame.f_code.co_filename):
            frame = frame.f_back
        if frame is None:
            return
        by_model = not frame.f_code.co_filename.startswith(_PYTORCH)
        is_number = not (isinstance(expression, Boolean) and isinstance(result, bool | BooleanAtom))
        if not by_model and not is_number and frame.f_code.co_name != "_compute_slice_index":
            return
        key = (id(env), expression, result, by_model)
        if key not in self.decisions:
            if is_number:
                holds = sympy.Eq(expression, result)
            else:
                holds = expression if result in (True, sympy.true) else sympy.Not(expression)
            lines = model_frames(traceback.extract_stack())[-1:]
            place = "".join(f"{os.path.basename(line.filename)}:{line.lineno}: {line.line}" for line in lines)
            self.decisions[key] = Decision(env, holds, place, by_model)


def _is_symbolic(file: str) -> bool:
    """Whether code of this file only compares sizes on behalf of other code."""
    if file.startswith(_PYTORCH):
        return file.replace(os.sep, "/").endswith(_SYMBOLIC) or "_sympy" in file
    return file.startswith("<") or file.endswith(("contextlib.py", "functools.py"))


@contextlib.contextmanager
def watch_sizes(watch: Watch) -> Iterator[None]:
    """Fills `watch` while the exporter runs.

    The exporter reports a fixed size only at its end, without a place. It reports decisions only if they do not already
    follow from its assumption that sizes are at least 2. The methods watched here are private to PyTorch.
    """
    replace, evaluate = ShapeEnv._set_replacement, ShapeEnv.evaluate_expr

    def replaced(self: ShapeEnv, symbol: Any, value: Any, *rest: Any, **options: Any) -> Any:
        if getattr(value, "is_number", False):
            watch.fixed_at.extend(model_frames(traceback.extract_stack())[-1:])
        return replace(self, symbol, value, *rest, **options)

    def evaluated(self: ShapeEnv, expression: Any, *rest: Any, **options: Any) -> Any:
        result = evaluate(self, expression, *rest, **options)
        watch.decided(self, expression, result)
        return result

    ShapeEnv._set_replacement = replaced  # type: ignore[method-assign, assignment]
    ShapeEnv.evaluate_expr = evaluated  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        ShapeEnv._set_replacement = replace  # type: ignore[method-assign]
        ShapeEnv.evaluate_expr = evaluate  # type: ignore[method-assign]


def conditions_of(
    watch: Watch, env: ShapeEnv, names: Mapping[Any, str], sizes: Mapping[str, int]
) -> list[SizeCondition]:
    """Turns the decisions of `watch` into conditions on named dimensions; drops those that hold at all sizes.

    Args:
        watch: watch of the export whose shapes are `env`.
        names: names of the dimensions, by the exporter's symbol.
        sizes: sizes of the example, by name.

    Raises:
        CaptureError: a decision cannot be written down.
    """
    found: dict[str, SizeCondition] = {}
    symbols = {symbol: sympy.Symbol(name, integer=True, positive=True) for symbol, name in names.items()}
    for decision in watch.decisions.values():
        expression = env.replace(decision.expression)
        if decision.env is not env or not expression.free_symbols or not expression.free_symbols <= set(symbols):
            continue
        expression = expression.xreplace(symbols)
        text = re.sub(r"\b(math\.|torch\.sym_|torch\.)", "", PythonPrinter().doprint(expression))
        try:
            condition = SizeCondition(ast.unparse(ast.parse(text)), decision.place)
            if condition.text in found or not violations(condition, sizes):
                continue
        except (LoopQError, SyntaxError) as error:
            raise CaptureError(
                f"The model decides by the size of its inputs at {decision.place}\nThe condition, {text}, cannot be "
                "kept with a program. Write it with whole numbers, or take the decision outside of the model."
            ) from error
        found[condition.text] = condition
    return list(found.values())


def violations(condition: SizeCondition, sizes: Mapping[str, int]) -> list[dict[str, int]]:
    """Sizes at which `condition` does not hold, smaller ones first; at most a few hundred are tried."""
    names = sorted(condition.names())
    longest = 4 * max(16, *sizes.values()) if len(names) == 1 else 24
    steps = [*range(1, longest + 1), *(1 << n for n in range(6, 14) if 1 << n > longest), *_LARGE]
    steps = steps if len(names) == 1 else [*steps[: longest : 1 if len(names) == 2 else 6], 64, 4096]
    grid = itertools.product(steps, repeat=len(names)) if len(names) < 4 else ()
    tried = [{**sizes, **dict(zip(names, point, strict=True))} for point in grid]
    return [point for point in tried if not condition.holds(point)]


def necessary(
    conditions: Sequence[SizeCondition], sizes: Mapping[str, int], agrees: Callable[[Mapping[str, int]], bool]
) -> tuple[SizeCondition, ...]:
    """The conditions that a program must check: where one does not hold, the program differs from the model.

    Most branches on sizes give the same result either way: no mask for one token, no padding for whole chunks. This is
    tried at a few small sizes. A condition that stops holding beyond some length is always checked.

    Args:
        conditions: conditions of the captured graph.
        sizes: sizes of the example.
        agrees: whether model and graph compute the same at some sizes.
    """
    kept = []
    for condition in conditions:
        points = violations(condition, sizes)
        unbounded = sum(any(size in _LARGE for size in point.values()) for point in points) >= len(_LARGE)
        small = [point for point in points if max(point.values()) <= 4 * max(16, *sizes.values())]
        probes = [*small[:2], *small[2 : len(small) - 1 : max(1, len(small) // 2)], *small[-1:]][:5]
        if unbounded or not probes or not all(agrees(point) for point in probes):
            kept.append(condition)
    return tuple(kept)


def dimension_names(
    values: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int | str, ...]]
) -> tuple[dict[Any, str], list[SizeCondition]]:
    """Names by the exporter's symbol, and how dimensions without their own symbol follow from others."""
    names: dict[Any, str] = {}
    derived: list[tuple[str, Any]] = []
    for name, value in values.items():
        for size, dim in zip(value.shape, shapes[name], strict=True):
            if isinstance(dim, str) and isinstance(size, torch.SymInt):
                expression = size.node.expr
                if expression.is_Symbol:
                    names.setdefault(expression, dim)
                else:
                    derived.append((dim, expression))
    relations = []
    for dim, expression in derived:
        if expression.free_symbols <= set(names):
            named = expression.xreplace({symbol: sympy.Symbol(names[symbol]) for symbol in expression.free_symbols})
            relations.append(SizeCondition(f"{dim} == {PythonPrinter().doprint(named)}"))
    return names, relations


def tied_sizes(env: ShapeEnv, names: Mapping[Any, str], main: Sequence[int | str]) -> list[SizeCondition]:
    """How sizes must follow from those of the main input for operators to work: flattened targets, one shorter than
    ids.

    Args:
        env: the exporter's shapes.
        names: names of the dimensions, by the exporter's symbol.
        main: names of the main input's dimensions.
    """
    found: dict[str, SizeCondition] = {}
    symbols = {symbol: sympy.Symbol(name, integer=True, positive=True) for symbol, name in names.items()}
    for guard in env.guards:
        expression = env.replace(guard.expr)
        if isinstance(expression, sympy.Eq) and expression.free_symbols <= set(symbols):
            equation = expression.xreplace(symbols)
            free = sorted(equation.free_symbols, key=lambda symbol: symbol.name)
            unknown = [symbol for symbol in free if symbol.name not in main] or free[-1:]
            solvable = len(unknown) == 1 and (equation.lhs - equation.rhs).is_polynomial(*free)
            solutions = sympy.solve(equation, unknown[0]) if solvable else []
            if len(solutions) == 1:
                whole = solutions[0].is_integer
                left, right = (unknown[0], solutions[0]) if whole else (equation.lhs, equation.rhs)
                found.setdefault(unknown[0].name, SizeCondition(f"{left} == {right}"))
    return list(found.values())
