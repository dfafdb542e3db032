"""The order of lowerings: what happens to a translated model until it can be written, as lists that print.

    >>> print(lowerings("qdq"))
    9 lowerings
      0  check-types             Refuses a model that computes in a type that ONNX cannot quantize.
      ...

`export(..., skip=("merge-products",))` leaves out those that only make files faster, to see what they change.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

import onnx_ir as ir

from loopq_compile.backends.onnx.attention import fuse_attention, lower_attention
from loopq_compile.backends.onnx.contrib import (
    leave_rounding,
    pack_head,
    pack_products,
    remove_unread,
    restate_norms,
    round_head,
)
from loopq_compile.backends.onnx.flatten import DOMAIN
from loopq_compile.backends.onnx.heads import keep_rows
from loopq_compile.backends.onnx.loop import lower_rows, roll
from loopq_compile.backends.onnx.merge import merge_products
from loopq_compile.backends.onnx.naming import clean_up, name_everything
from loopq_compile.backends.onnx.qdq import (
    check_types,
    lower_dynamic_scales,
    lower_linears,
    lower_pairs,
    lower_stacked_weights,
    lower_weights,
    spell_out_pairs,
)
from loopq_compile.backends.onnx.rotary import fuse_rotary
from loopq_compile.backends.onnx.storage import store_half
from loopq_compile.errors import InternalError, LoopQError, did_you_mean


class Lowering(ir.passes.InPlacePass):
    """A function that rewrites a graph in place, as a pass of onnx_ir.

    Args:
        function: takes the graph; what it returns is true if it changed something. Its name and the first line of its
            docstring are those of the lowering.
        removes: opaque nodes of which none is left afterwards.
        needed: whether files need it; others only make them faster.
    """

    def __init__(self, function: Callable[[ir.Graph], Any], *removes: str, needed: bool = True) -> None:
        described: Any = function.func if isinstance(function, partial) else function
        self.function, self.removes, self.needed = function, removes, needed
        self.name = described.__name__.replace("_", "-")
        self.about = described.__doc__.strip().splitlines()[0]

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return ir.passes.PassResult(model, bool(self.function(model.graph)))

    def ensures(self, model: ir.Model) -> None:
        left = [node.name for node in model.graph if node.domain == DOMAIN and node.op_type in self.removes]
        if left:
            raise ir.passes.PostconditionError(f"{self.name} left {left[:5]}.")


class Lowerings:
    """A list of lowerings.

    Args:
        items: in order.
    """

    def __init__(self, items: Iterable[Lowering]) -> None:
        self.items = list(items)

    @property
    def names(self) -> list[str]:
        """The names of the lowerings."""
        return [item.name for item in self.items]

    def __str__(self) -> str:
        """One line for each: its number, its name, and what it does."""
        lines = [f"{number:3d}  {item.name.ljust(22)}  {item.about}" for number, item in enumerate(self.items)]
        return "\n".join([f"{len(self.items)} lowerings", *lines])

    def without(self, names: Collection[str]) -> Lowerings:
        """The list without the lowerings of these names.

        Raises:
            LoopQError: there is no such lowering, or a file needs it.
        """
        optional = [item.name for item in self.items if not item.needed]
        for name in names:
            if name not in optional:
                raise LoopQError(
                    f"There is no lowering {name!r} that can be left out here.{did_you_mean(name, optional)}"
                )
        return Lowerings(item for item in self.items if item.name not in names)

    def run(self, model: ir.Model) -> ir.Model:
        """Applies all of them in place.

        Raises:
            InternalError: one left opaque nodes that it should have removed.
        """
        for item in self.items:
            try:
                item(model)
            except ir.passes.PostconditionError as error:
                raise InternalError(f"Nodes without a translation to standard ONNX are left: {error}") from error
        return model


def lowerings(target: str, *, products: str = "packed", head_bits: int | None = None) -> Lowerings:
    """What turns a translated model into one for `target`."""
    optional = partial(Lowering, needed=False)
    rows = target == "onnxruntime" and products == "int8"
    standard = [
        Lowering(check_types),
        Lowering(lower_stacked_weights),
        Lowering(lower_rows, "Row"),
        Lowering(lower_dynamic_scales, "DynamicScale"),
        Lowering(lower_weights),
        *([optional(spell_out_pairs)] if rows else []),
        Lowering(lower_pairs, "Quantize", "Dequantize"),
        Lowering(lower_linears, "Linear"),
        Lowering(lower_attention, "Attention"),
        Lowering(roll, "LoopBegin", "LoopEnd"),
    ]
    if target == "qdq":
        return Lowerings(standard)
    return Lowerings(
        [
            Lowering(partial(pack_products, products=products)),
            *([Lowering(partial(pack_head, bits=head_bits))] if head_bits is not None else []),
            optional(fuse_rotary),
            optional(merge_products),
            optional(fuse_attention),
            optional(keep_rows),
            Lowering(remove_unread),
            optional(restate_norms),
            *standard,
        ]
    )


def carrying(head_bits: int | None = None) -> Lowerings:
    """For an engine with forms of its own for weights, linears and attention: these stay opaque."""
    return Lowerings(
        [
            Lowering(check_types),
            *([Lowering(partial(round_head, bits=head_bits))] if head_bits is not None else []),
            Lowering(fuse_rotary, needed=False),
            Lowering(leave_rounding),
            Lowering(remove_unread),
            Lowering(partial(spell_out_pairs, static=True), "Quantize"),
            Lowering(lower_dynamic_scales, "DynamicScale"),
        ]
    )


def finishing(float_bits: int) -> Lowerings:
    """What follows when all forms of a program are in one model."""
    half = [Lowering(store_half)] if float_bits == 16 else []
    return Lowerings([*half, Lowering(clean_up), Lowering(name_everything)])
