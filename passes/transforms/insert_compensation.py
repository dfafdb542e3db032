"""`insert-compensation`: a low-rank part beside every quantized linear, with coefficients per loop."""

from __future__ import annotations

import operator
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from loopq_compile.calibration import distributed
from loopq_compile.calibration.batches import real_tokens, statistics_batches, token_mask
from loopq_compile.errors import InternalError, LoopQError
from loopq_compile.graph.constants import evaluate
from loopq_compile.graph.device import device_of
from loopq_compile.graph.evaluate import run
from loopq_compile.graph.insert import add_constant, attribute_name, call, inserting
from loopq_compile.graph.keys import LEARN
from loopq_compile.graph.loops import get_tag
from loopq_compile.graph.state import Site, get_state
from loopq_compile.graph.weights import site_calls
from loopq_compile.operators import ops
from loopq_compile.operators.precision import products_in, wide_type
from loopq_compile.passes.base import Pass, PassResult
from loopq_compile.passes.quantize.collect_ranges import vocabulary_size
from loopq_compile.progress import progress
from loopq_compile.solvers.chains import Chain, find_chains

_aten = torch.ops.aten
_LEAST = 1e-6
"""Share of the largest second moment that every channel has at least, so that none is divided by zero."""


class InsertCompensation(Pass):
    """Corrects the error of rounding a weight by a low-rank part: `W x ~ Q(W) x + up diag(c_t) down^T x`.

    Before: `linear(Q(x), Q(W))`. After: `compensate(linear(Q(x), Q(W)), x, row t of c, down, up)`, where `x` is the
    linear's input before it is rounded. All loops share `down [K, r]` and `up [N, r]`; each has its own coefficients
    `c_t [r]`, which start at 1. The product of both is the best approximation of rank r of `W - Q(W)` for inputs with
    the second moments that the program has now, if its channels were uncorrelated (LQER, Zhang et al. 2024):

        (W - Q(W)) S ~ U Sigma V^T,    up = U sqrt(Sigma),    down = S^-1 V sqrt(Sigma),    S = diag(sqrt(E[x_j^2]))

    With a weight for each loop, `W - Q(W)` is the mean over its calls. `calibrate` learns all three as "adapter".

    Put it after the solver, which corrects what it can by itself, and before `latent-weights`, after which the weight
    is gone. Does nothing to graphs that have compensation, to packed weights, and to rank 0.

    Args:
        rank: r.
        max_tokens: about how many tokens are measured; None for the option `statistics_tokens`.

    Raises:
        LoopQError: the rank is no number from 0 on, or there is no calibration data.
    """

    def __init__(self, rank: int = 8, max_tokens: int | None = None) -> None:
        super().__init__()
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
            raise LoopQError(f"InsertCompensation(rank={rank!r}) must be an integer from 0 on.")
        self.rank, self.max_tokens = rank, max_tokens

    def requires(self, graph_module: fx.GraphModule) -> None:
        state = self.state(graph_module)
        if state.scheme is None or not state.sites:
            raise InternalError("insert-compensation needs annotate-linears and quantize-weights before it.")
        if self.rank and state.run.calibration is None:
            raise LoopQError("Compensation measures inputs and needs calibration data: calibration=[token tensors].")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        state = self.state(graph_module)
        if not self.rank or any(node.target is ops.compensate.default for node in graph_module.graph.nodes):
            return PassResult(graph_module, False)
        chains: dict[str, list[Chain]] = {}
        for chain in find_chains(graph_module):
            if chain.latent is not None:
                raise LoopQError(f"insert-compensation needs {chain.where} as it was: put it before latent-weights.")
            chains.setdefault(chain.site.name, []).append(chain)
        moments = self._moments(graph_module) if chains else {}
        extra = 0
        for site, linears in site_calls(graph_module):
            if site.name not in chains:
                continue
            error = _mean_error(graph_module, chains[site.name])
            down, up = low_rank(error, moments[site.name], self.rank)
            extra += _insert(graph_module, site, linears, down, up)
        if extra:
            state.note(f"rank {self.rank}: {extra:,} numbers beside quantized weights")
        return PassResult(graph_module, bool(extra))

    def _moments(self, graph_module: fx.GraphModule) -> dict[str, Tensor]:
        """Mean squares of every input channel over all loops, `[K]` by site."""
        state, device = self.state(graph_module), device_of(graph_module)
        watched: dict[fx.Node, list[str]] = {}
        for site, linears in site_calls(graph_module):
            for linear in linears:
                watched.setdefault(unrounded(linear), []).append(site.name)
        wanted = self.max_tokens or state.options.statistics_tokens
        vocabulary = vocabulary_size(graph_module)
        batches = statistics_batches(state.run.calibration, state.signature, vocabulary, device, wanted)
        sums: dict[str, Tensor] = {}
        mask: Tensor | None = None

        def watch(node: fx.Node, value: Any) -> None:
            for name in watched.get(node, ()):
                rows = real_tokens(value, mask).float().reshape(-1, value.shape[-1])
                sums[name] = sums.get(name, 0) + rows.square().sum(0)

        for inputs in progress(batches, "Measuring inputs", len(batches)):
            mask = token_mask(state.signature, inputs)
            with products_in(state.options.precision, device):
                run(graph_module, inputs, watch)
        distributed.total([sums[name] for name in sorted(sums)])
        return sums


def unrounded(linear: fx.Node) -> fx.Node:
    """What a linear reads, before it is rounded."""
    x = linear.args[0]
    assert isinstance(x, fx.Node)
    if x.target is ops.dequantize.default and isinstance(x.args[0], fx.Node):
        x = x.args[0].args[0]  # type: ignore[assignment]
    assert isinstance(x, fx.Node)
    return x


def low_rank(error: Tensor, moments: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`(down [K, r], up [N, r])` with the smallest `E |error x - up down^T x|^2` for uncorrelated channels.

    Args:
        error: `[N, K]`.
        moments: mean squares of the channels of x, or any multiple of them, `[K]`.
        rank: r; no more than N and K.
    """
    size = moments.double().clamp_min(_LEAST * float(moments.max().clamp_min(1e-30))).sqrt()
    left, values, right = torch.linalg.svd(error.double() * size, full_matrices=False)
    rank = min(rank, len(values))
    root = values[:rank].sqrt()
    return (right[:rank].t() * root / size.unsqueeze(1)).contiguous(), (left[:, :rank] * root).contiguous()


def _mean_error(graph_module: fx.GraphModule, chains: list[Chain]) -> Tensor:
    """`W - Q(W)`, the mean over all calls, `[N, K]`."""
    values = dict(evaluate(graph_module, [node for chain in chains for node in (chain.plain, chain.end)]))
    calls = sum(len(chain.calls) for chain in chains)
    errors = [len(chain.calls) * (values[chain.plain].float() - values[chain.end].float()) for chain in chains]
    return torch.stack(errors).sum(0) / calls


def _insert(graph_module: fx.GraphModule, site: Site, linears: list[fx.Node], down: Tensor, up: Tensor) -> int:
    """Returns how many numbers the site stores more."""
    graph, loops = graph_module.graph, get_state(graph_module).loops
    dtype = wide_type(linears[0].meta["val"].dtype)
    rows = max(loops.iterations(get_tag(linear)) for linear in linears)
    tables = {"coefficients": down.new_ones(rows, down.shape[1]), "down": down, "up": up}
    prefix = f"compensation.{attribute_name(site.name)}"
    nodes = {part: add_constant(graph_module, f"{prefix}.{part}", values.to(dtype)) for part, values in tables.items()}
    for node in nodes.values():
        node.meta[LEARN] = "adapter"
    for linear in linears:
        row = loops.row(get_tag(linear)) if rows > 1 else 0
        with inserting(graph, before=linear.next, tag=get_tag(linear), site=site.name):
            chosen = call(graph, _aten.select.int, nodes["coefficients"], 0, row)
            made = call(graph, ops.compensate.default, linear, unrounded(linear), chosen, nodes["down"], nodes["up"])
        made.meta["val"] = linear.meta["val"]
        linear.replace_all_uses_with(made, partial(operator.is_not, made))
    return sum(values.numel() for values in tables.values())
