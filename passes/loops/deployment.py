"""The passes between a compiled program and one that is deployed: a cache, rolled loops, early exit."""

from __future__ import annotations

from torch import fx

from loopq_compile.errors import LoopQError
from loopq_compile.graph.caches import has_cache
from loopq_compile.graph.early_exit import has_early_exit
from loopq_compile.graph.rolled import rolled_loops
from loopq_compile.graph.signature import LOOPS_AXIS
from loopq_compile.graph.state import get_state
from loopq_compile.passes.base import Pass
from loopq_compile.passes.cache.add_cache import AddCache
from loopq_compile.passes.loops.exit_early import ExitEarly
from loopq_compile.passes.loops.roll_loops import RollLoops


def deployment(
    graph_module: fx.GraphModule,
    *,
    cache: bool = False,
    rolled: bool = False,
    early_exit: bool = False,
    last_token: bool = False,
    kv_bits: int | None = None,
    stacked: bool | None = None,
) -> list[Pass]:
    """The passes that `graph_module` lacks for what is asked; none for a program that was already transformed so.

    Args:
        cache, last_token, kv_bits: a key-value cache, as in `Program.with_cache`.
        rolled: loops as one node each.
        early_exit: a rolled loop that may stop.
        stacked: whether a layer has one cache for all iterations of its loop; None: if `rolled`.

    Raises:
        LoopQError: the options contradict each other or what the program already is.
    """
    signature, has_rolled = get_state(graph_module).signature, bool(rolled_loops(graph_module))
    cached, exits = has_cache(signature), has_early_exit(signature)
    for option, value in (("last_token", last_token), ("kv_bits", kv_bits)):
        if value and not cache:
            raise LoopQError(f"{option}={value!r} is for files with a key-value cache: give cache=True.")
        if value and cached:
            raise LoopQError(f"This program has a key-value cache already: give {option}={value!r} to with_cache().")
    if early_exit and not (rolled or has_rolled):
        raise LoopQError("early_exit=True needs a loop that can stop: give form='rolled'.")
    if cache and has_rolled and not cached:
        raise LoopQError("This program is rolled, and has no cache: add it first, program.with_cache(stacked=True).")
    if cached and rolled and not any(LOOPS_AXIS in spec.shape for spec in signature.inputs):
        raise LoopQError("A rolled loop needs one cache for all its iterations: use with_cache(stacked=True).")
    passes: list[Pass] = []
    if cache and not cached:
        stack = rolled if stacked is None else stacked
        passes.append(AddCache(stacked=stack, last_token=last_token, kv_bits=kv_bits))
    if rolled and not has_rolled:
        passes.append(RollLoops())
    if early_exit and not exits:
        passes.append(ExitEarly())
    return passes
