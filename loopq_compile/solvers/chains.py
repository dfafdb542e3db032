"""Where solvers find weights in a graph, and how they write integers into it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from loopq_compile.errors import InternalError
from loopq_compile.graph.constants import chain_name, evaluate, root_weight
from loopq_compile.graph.insert import add_constant, call, inserting
from loopq_compile.graph.keys import SOLVED
from loopq_compile.graph.loops import get_tag
from loopq_compile.graph.state import Site, get_tensor, set_tensor
from loopq_compile.graph.weights import site_calls, weight_chain
from loopq_compile.operators import ops
from loopq_compile.operators.precision import OFFSETS
from loopq_compile.operators.quantize import bounded, peak
from loopq_compile.solvers.rtn import Grid

_REACH = 0.45
"""How far from an integer's middle an offset may put a weight, in units of the scale; the border is at one half."""


@dataclass
class Chain:
    """The nodes between a stored weight and linears that read it: for all calls of a weight, or for those of one loop.

    Args:
        site: site of the weight.
        end: the dequantize node.
        calls: the linears that read `end`, in program order.
    """

    site: Site
    end: fx.Node
    calls: list[fx.Node] = field(default_factory=list)

    @property
    def quantize(self) -> Any:
        """The node that rounds."""
        return self.end.args[0]

    @property
    def rounding(self) -> Any:
        """The node that adds rounding offsets; None if the chain has none."""
        before = self.quantize.args[0]
        return before if before.target is ops.offset.default else None

    @property
    def latent(self) -> Any:
        """The node that reads latent numbers; None if the weight is stored as it is."""
        before = self.quantize.args[0]
        return before if before.target is ops.from_latent.default else None

    @property
    def plain(self) -> fx.Node:
        """The weight W' before rounding offsets."""
        return self.quantize.args[0] if self.rounding is None else self.rounding.args[0]

    @property
    def solved(self) -> bool:
        """Whether a solver chose the integers."""
        return SOLVED in self.quantize.args[0].meta

    @property
    def where(self) -> str:
        """Site and loops, for errors."""
        return f"{self.site.name!r} ({', '.join(str(get_tag(node) or 'outside loops') for node in self.calls)})"

    def original(self, graph_module: fx.GraphModule) -> Tensor:
        """The stored weight, `[out, K₀]`, float32."""
        return get_tensor(graph_module, str(root_weight(self.end).target)).detach().float()

    def grid(self, scale: Tensor, width: int) -> Grid:
        """The grid for scales that broadcast to `[out, width / size]`."""
        size, q_min, q_max = self.quantize.args[2:5]
        return Grid(scale.float().expand(self.site.shape[0], width // size), size, q_min, q_max)


@dataclass
class Family:
    """Chains whose linears read the same tensors in all their calls, and so share statistics."""

    chains: list[Chain]

    @property
    def calls(self) -> int:
        """How often the inputs are read."""
        return len(self.chains[0].calls)

    def first(self, number: int, position: Callable[[fx.Node], int]) -> tuple[fx.Node, Chain]:
        """The linear of call `number` that runs first, and its chain."""
        chain = min(self.chains, key=lambda chain: position(chain.calls[number]))
        return chain.calls[number], chain


def find_chains(graph_module: fx.GraphModule) -> list[Chain]:
    """Quantized chains in order of first use; none in a packed graph."""
    found: dict[fx.Node, Chain] = {}
    for site, linears in site_calls(graph_module):
        for linear in linears:
            end: Any = weight_chain(linear)[-1]
            if end.target is ops.dequantize.default and end.args[0].target is ops.quantize.default:
                found.setdefault(end, Chain(site, end)).calls.append(linear)
    return list(found.values())


def find_families(chains: list[Chain], alone: Callable[[fx.Node], bool]) -> list[Family]:
    """Groups chains by what they read; chains with a linear that needs its own statistics (`alone`) stay separate."""
    families: dict[Any, list[Chain]] = defaultdict(list)
    for chain in chains:
        own = any(alone(linear) for linear in chain.calls)
        families[chain.end if own else tuple(linear.args[0] for linear in chain.calls)].append(chain)
    return [Family(members) for members in families.values()]


def write_codes(
    graph_module: fx.GraphModule, chain: Chain, plain: Tensor, codes: Tensor, grid: Grid, centered: bool = True
) -> None:
    """Puts scales (where they changed) and rounding offsets into the chain, so that it quantizes to `codes`.

    Args:
        graph_module: changed in place; tensors are replaced, never written to.
        chain: chain of the weight.
        plain: W' as the chain computes it, `[out, K]`.
        codes: integers as floats, `[out, K]`.
        grid: the scales that belong to them.
        centered: whether the weight plus its offset is the middle of its integer's interval. Otherwise it is the point
            of the interval nearest to the weight, from which learned rounding reaches the neighbouring integer sooner.
    """
    scale = _write_scale(graph_module, chain, plain, grid)
    written = chain.grid(scale, plain.shape[1])
    latent = plain.float() / written.steps
    steps = (codes if centered else latent.clamp(codes - _REACH, codes + _REACH)) - latent
    added, node, size = chain.rounding, chain.quantize, chain.quantize.args[2]

    def gives_codes(steps: Tensor) -> bool:
        return torch.equal(ops.quantize(ops.offset(plain, steps, scale, size), scale, *node.args[2:5]).float(), codes)

    small = steps.to(OFFSETS)
    steps = small if gives_codes(small) else steps  # offsets of hundreds of steps are too coarse in half precision
    if not gives_codes(steps):
        raise InternalError(f"The rounding offsets of {chain.site.name!r} do not give the solver's integers.")
    if added is None:
        table = add_constant(graph_module, f"{chain_name(graph_module, chain.end)}_rounding", steps)
        with inserting(graph_module.graph, before=node, tag=None, site=chain.site.name):
            added = call(graph_module.graph, ops.offset.default, node.args[0], table, node.args[1], size)
        node.replace_input_with(node.args[0], added)
    else:
        set_tensor(graph_module, str(added.args[1].target), steps)
    added.meta[SOLVED] = True


def _write_scale(graph_module: fx.GraphModule, chain: Chain, plain: Tensor, grid: Grid) -> Tensor:
    """Sets the chain's scales to those of `grid`; returns the scales that the chain then computes.

    If they follow the weight (`dynamic_scale`), the clip ratios are changed, so that calibration can continue from
    there.
    """
    node: Any = chain.quantize.args[1]
    ((_, scale),) = evaluate(graph_module, [node])
    if torch.equal(scale.float().expand_as(grid.scale), grid.scale):
        return scale
    fitted = bounded(grid.scale.to(scale.dtype))
    if node.target is not ops.dynamic_scale.default:
        readers = tuple(filter(None, (chain.quantize, chain.end, chain.rounding)))
        return _replace_table(graph_module, chain, node, readers, "scale", fitted)
    size, limit = node.args[2:4]
    largest = peak(plain.float().unflatten(1, (-1, size)), limit)
    clip = torch.where(largest != 0, grid.scale * limit / largest, 1.0)
    dtype = get_tensor(graph_module, str(node.args[1].target)).dtype
    clip = _replace_table(graph_module, chain, node.args[1], (node,), "clip", clip.to(dtype))
    return ops.dynamic_scale(plain, clip, size, limit)


def _replace_table(
    graph_module: fx.GraphModule, chain: Chain, table: fx.Node, readers: tuple[fx.Node, ...], kind: str, values: Tensor
) -> Tensor:
    """Gives `readers` the table `values`, which replaces the old one if nothing else reads that."""
    if table.op == "get_attr" and set(table.users) == set(readers):
        set_tensor(graph_module, str(table.target), values)
        return values
    fresh = add_constant(graph_module, f"{chain_name(graph_module, chain.end)}_fitted_{kind}", values)
    fresh.meta.update({key: value for key, value in table.meta.items() if key.startswith("loopq_")})
    for reader in readers:
        reader.replace_input_with(table, fresh)
    return values
