"""Conditions on sizes: at which batches and lengths a captured graph is the model.

A model may branch on sizes (`if ids.shape[1] > 16`). A graph holds one branch only. The condition is therefore kept
with it, as text over the names of dimensions, and checked in every call. Saved programs carry it too. Since files may
come from anywhere, a small evaluator of arithmetic reads the text, never Python itself.
"""

from __future__ import annotations

import ast
import itertools
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from loopq_compile.errors import LoopQError

_LONGEST = 4000
_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "ceil": math.ceil,
    "float": float,
    "floor": math.floor,
    "log2": math.log2,
    "max": max,
    "min": min,
    "round": round,
    "sqrt": math.sqrt,
    "trunc": math.trunc,
}


@dataclass(frozen=True)
class SizeCondition:
    """A condition that the sizes of a call must meet.

    Args:
        text: an expression over names of dimensions, such as `sequence <= 16`.
        where: the line of the model's source that depends on it, "" if unknown.
    """

    text: str
    where: str = ""

    def holds(self, sizes: Mapping[str, Any]) -> bool:
        """Whether it holds at `sizes` (by name of dimension); False if it cannot be computed.

        Raises:
            LoopQError: the text is not a condition on these sizes.
        """
        return bool(evaluate(self.text, sizes))

    def numbers(self) -> set[int]:
        """The whole numbers in it."""
        values = (node.value for node in ast.walk(_parse(self.text)) if isinstance(node, ast.Constant))
        return {value for value in values if isinstance(value, int)}

    def names(self) -> set[str]:
        """The dimensions that it names."""
        return {
            node.id for node in ast.walk(_parse(self.text)) if isinstance(node, ast.Name) and node.id not in _FUNCTIONS
        }


def evaluate(text: str, sizes: Mapping[str, Any]) -> Any:
    """The value of an expression over `sizes`; False where arithmetic fails, as in a division by zero.

    Raises:
        LoopQError: the text holds anything but arithmetic, comparisons and known functions of known names.
    """
    try:
        return _value(_parse(text), sizes)
    except (ArithmeticError, ValueError):
        return False
    except (RecursionError, TypeError) as error:
        raise _refused(text) from error


def _parse(text: str) -> ast.expr:
    if len(text) > _LONGEST:
        raise LoopQError(f"the condition {text[:40]!r}... is too long")
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _refused(text) from error


def _refused(text: str) -> LoopQError:
    return LoopQError(f"{text[:200]!r} is not a condition on sizes")


def _value(node: ast.expr, sizes: Mapping[str, Any]) -> Any:
    def value(part: ast.expr) -> Any:
        return _value(part, sizes)

    if isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
        return node.value
    if isinstance(node, ast.Name) and node.id in sizes:
        return sizes[node.id]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        base, exponent = value(node.left), value(node.right)
        if not -8 <= exponent <= 8:
            raise _refused(ast.unparse(node))
        return base**exponent
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](value(node.left), value(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](value(node.operand))
    if isinstance(node, ast.BoolOp):
        return (all if isinstance(node.op, ast.And) else any)(value(part) for part in node.values)
    if isinstance(node, ast.Compare) and all(type(op) in _OPERATORS for op in node.ops):
        parts = [value(part) for part in (node.left, *node.comparators)]
        return all(_OPERATORS[type(op)](*pair) for op, pair in zip(node.ops, itertools.pairwise(parts), strict=True))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        function = _FUNCTIONS.get(node.func.id)
        if function is not None and node.args:
            return function(*(value(part) for part in node.args))
    raise _refused(ast.unparse(node))


def check_conditions(
    conditions: tuple[SizeCondition, ...], sizes: Mapping[str, int], captured: Mapping[str, int]
) -> None:
    """Refuses sizes at which the model computes something other than the captured graph.

    Raises:
        LoopQError: names the condition, the line it comes from, and the sizes of capture and call.
    """
    for condition in conditions:
        if not condition.holds(sizes):
            names = sorted(condition.names())
            now, then = (", ".join(f"{name} {source.get(name)}" for name in names) for source in (sizes, captured))
            if not condition.where:
                raise LoopQError(
                    f"The inputs' sizes do not fit together: this program needs {condition.text}, and the call has "
                    f"{now}. It was captured at {then}."
                )
            raise LoopQError(
                f"The model takes another way where {condition.text} does not hold ({condition.where}). This program "
                f"was captured at {then}, the call has {now}: compile with an example of that size."
            )


def check_condition_names(conditions: tuple[SizeCondition, ...], captured: Mapping[str, int]) -> None:
    """Refuses conditions, read from a file, that the captured sizes themselves do not meet.

    Raises:
        LoopQError: one cannot be read, or does not hold.
    """
    for condition in conditions:
        if any(not 0 < size < 1 << 24 for size in captured.values()) or not condition.holds(captured):
            raise LoopQError(f"its condition {condition.text[:200]!r} does not fit the sizes it was captured at")
