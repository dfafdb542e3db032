"""Predicts what compiling a captured model would do: what would be quantized, and what is not possible."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loopq_compile.errors import LoopQError
from loopq_compile.graph.scheme import Scheme
from loopq_compile.graph.state import copy_graph, get_state
from loopq_compile.passes.loops.roll_loops import RollLoops
from loopq_compile.passes.loops.tag_loops import TagLoops
from loopq_compile.passes.quantize.annotate_linears import AnnotateLinears
from loopq_compile.passes.quantize.canonicalize_linears import CanonicalizeLinears
from loopq_compile.passes.quantize.other_products import OTHER_PRODUCTS
from loopq_compile.pipeline import Pipeline
from loopq_compile.program import Program


@dataclass(frozen=True)
class Feasibility:
    """What `compile` and `export` would report for a model.

    Args:
        scheme: the assumed bits of weights and activations.
        quantized: names of the linears that would be quantized.
        parameters: total number of their weights.
        left: why the other products stay in floating point, by name.
        obstacles: by feature (`quantization`, `key-value cache`, `rolled form`), why it is refused; None if it works.
    """

    scheme: str
    quantized: list[str]
    parameters: int
    left: dict[str, str]
    obstacles: dict[str, str | None]

    def describe(self) -> list[str]:
        """Lines for people."""
        total = len(self.quantized) + len(self.left)
        lines = [f"{self.scheme} would quantize {len(self.quantized)} of {total} products, {self.parameters:,} weights"]
        lines += [f"{name} stays in floating point: {why}" for name, why in self.left.items()]
        return lines + [f"{what}: {why or 'works'}" for what, why in self.obstacles.items()]


def feasibility(program: Program, scheme: str = "w4a4") -> Feasibility:
    """Tries a model without quantizing it.

    Args:
        program: captured, without a scheme; it is not changed.
        scheme: bits to assume.
    """
    graph_module = copy_graph(program.graph_module)
    state = get_state(graph_module)
    state.scheme = Scheme.parse(scheme)
    pipeline = Pipeline([TagLoops(), CanonicalizeLinears(), AnnotateLinears()], "inspect")
    obstacles = {"quantization": _refusal(lambda: pipeline.run(graph_module))}
    obstacles["key-value cache"] = _refusal(program.with_cache)
    if program.loops.main:
        rolled = Pipeline([TagLoops(), RollLoops()], "inspect")
        obstacles["rolled form"] = _refusal(lambda: rolled.run(copy_graph(program.graph_module)))
    quantized = [site for site in state.sites.values() if site.reason is None]
    left = {site.name: site.reason for site in state.sites.values() if site.reason is not None}
    return Feasibility(
        state.scheme.name,
        [site.name for site in quantized],
        sum(site.shape[0] * site.shape[1] for site in quantized),
        left | state.results.get(OTHER_PRODUCTS, {}),
        obstacles,
    )


def _refusal(attempt: Callable[[], Any]) -> str | None:
    try:
        attempt()
    except LoopQError as error:
        return str(error)
    return None
