"""Proves that attention lets no token see later ones, and that a cache can serve it. The nodes between its scores and
its weights run on random scores: for all tokens, for all but one, and for only the last rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from loopq_compile.errors import LoopQError
from loopq_compile.graph.constants import evaluate
from loopq_compile.passes.cache.attention import Attention
from loopq_compile.passes.cache.cache_regions import Regions, shape_of, where
from loopq_compile.passes.cache.probing import Probe, same

_ALL, _SOME, _ROWS = 6, 5, 2


def check_causal(regions: Regions, attention: Attention) -> None:
    """Checks one attention.

    Raises:
        LoopQError: a token sees later ones, or weights depend on more than queries, keys and positions.
    """
    if attention.is_causal:
        return
    if any(mask not in regions.positions for mask in attention.masks):
        raise LoopQError(
            f"The mask of this attention depends on tokens, so that a key-value cache cannot serve it: "
            f"{where(attention.node)}. Use cache=False."
        )
    weights = _fused if attention.is_fused else _spelled_out
    probe = Probe(regions)
    whole = weights(probe, attention, _ALL, _ALL)
    if whole is not None:
        columns = torch.arange(whole.shape[-1], device=whole.device) % _ALL
        later = columns > torch.arange(_ALL, device=whole.device)[:, None]
    if whole is None or (whole * later).abs().max() > 0:
        raise LoopQError(
            f"This attention lets tokens see later ones, which a key-value cache cannot serve: {where(attention.node)}."
            " Use cache=False."
        )
    shorter, rows = weights(probe, attention, _SOME, _SOME), weights(probe, attention, _ALL, _ROWS)
    assert shorter is not None and rows is not None
    if not same(whole[..., :_SOME, columns < _SOME], shorter) or not same(whole[..., -_ROWS:, :], rows):
        raise LoopQError(
            f"The weights of this attention depend on the length of the text or on other queries, so that a key-value "
            f"cache cannot serve it: {where(attention.node)}. Use cache=False."
        )


def _scores(probe: Probe, node: fx.Node, length: int) -> Tensor:
    """The same scores for every length: those of fewer tokens are part of those of more."""
    shape = [probe.number(size, _ALL) for size in shape_of(node)]
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    kept = torch.arange(shape[-1]) % _ALL < length
    return whole[..., :length, kept].to(node.meta["val"].device)


def _fused(probe: Probe, attention: Attention, length: int, rows: int) -> Tensor | None:
    if not attention.masks:
        return None
    (mask,) = probe.regions.compute(attention.masks, length).values()
    scores = torch.zeros(length, attention.passes * length, dtype=torch.float64, device=mask.device)
    blocked = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    return blocked.softmax(-1).nan_to_num(0)[..., -rows:, :]


def _spelled_out(probe: Probe, attention: Attention, length: int, rows: int) -> Tensor:
    regions, (scores, *chain, product) = probe.regions, attention.inside
    values: dict[fx.Node, Any] = {scores: _scores(probe, scores, length)[..., -rows:, :]}
    for node in chain:
        for argument in node.all_input_nodes:
            if argument not in values:
                values[argument] = _beside(probe, attention, argument, length, rows)
        sizes: Any = node.args[1] if len(node.args) > 1 else None
        if isinstance(sizes, list | tuple):
            last = len(sizes) - 1
            given = {i: size for i, size in enumerate(sizes) if size in regions.sizes}
            numbers = [
                probe.number(size.meta["val"], length if i == last else rows) if i in given else size
                for i, size in enumerate(sizes)
            ]
            args, node.args = node.args, (node.args[0], numbers, *node.args[2:])
            values[node] = probe.run(node, values)
            node.args = args
        else:
            values[node] = probe.run(node, values)
    weights: Tensor = values[product.args[0]]  # type: ignore[index]
    return weights


def _beside(probe: Probe, attention: Attention, node: fx.Node, length: int, rows: int) -> Any:
    """What the chain reads in addition to the scores."""
    regions = probe.regions
    if not isinstance(node.meta.get("val"), Tensor):
        return probe.number(node.meta["val"], length)
    axes, rank = regions.axes(node), len(shape_of(node))
    if node in probe.constants:
        value = dict(evaluate(regions.graph_module, [node]))[node]
    elif node in regions.positions:
        value = regions.compute([node], length)[node]
    elif axes in ([], [rank - 2]):
        like = node.meta["val"]
        shape = [probe.number(size, length) for size in shape_of(node)]
        value = torch.ones(shape, dtype=like.dtype, device=like.device)
    else:
        raise LoopQError(
            f"The scores of this attention are combined with {node.name!r}, which depends on the keys' tokens, so that "
            f"a key-value cache cannot serve it: {where(attention.softmax)}. Use cache=False."
        )
    value = value.double() if value.is_floating_point() else value
    return value[..., -rows:, :] if rank - 2 in axes else value
