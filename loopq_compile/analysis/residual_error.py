"""How far a program deviates from its model, point by point along the unrolled run."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from loopq_compile.calibration.batches import bind_batch
from loopq_compile.graph.device import device_of
from loopq_compile.graph.evaluate import values_of
from loopq_compile.graph.keys import SITE
from loopq_compile.graph.loops import get_tag
from loopq_compile.graph.printer import site_of
from loopq_compile.graph.state import get_state

_COPIES = [["to"], ["_to_copy"], ["slice"], ["alias"], ["clone"], ["contiguous"]]
"""Operators that only pass on the value of another node."""


@dataclass(frozen=True)
class Point:
    """A node at which model and program are compared.

    Args:
        node: its name in both graphs.
        kind: "state", where only the residual stream passes on to later layers; or "linear", the output of a quantized
            linear.
        site: module or linear, for people.
        loop: iteration of the main loop; None outside it.
    """

    node: str
    kind: str
    site: str
    loop: int | None


def points(reference: fx.GraphModule) -> list[Point]:
    """Where to compare, in program order."""
    state = get_state(reference)
    quantized = {site.name for site in state.sites.values() if site.reason is None}
    residual = set(residual_nodes(reference.graph))
    found = []
    for node in reference.graph.nodes:
        tag = get_tag(node)
        loop = tag.index[0] if tag and tag.loops[0] == 0 else None
        if node in residual:
            found.append(Point(node.name, "state", re.sub(r"\.slice\(.*?\)", "", site_of(node)), loop))
        elif node.meta.get(SITE) in quantized and node.target is torch.ops.aten.linear.default:
            found.append(Point(node.name, "linear", node.meta[SITE], loop))
    return found


def residual_nodes(graph: fx.Graph) -> list[fx.Node]:
    """Nodes whose tensor is all that later nodes read of the tokens, such as the residual stream between two
    sub-layers.

    Sizes, masks, and tensors narrower than the stream (gates) do not count. Models that later read an older state
    (an injected prelude) have no such nodes there.
    """
    nodes = list(graph.nodes)
    order = {node: i for i, node in enumerate(nodes)}
    last = {node: max((order[user] for user in node.users if user.op != "output"), default=-1) for node in nodes}
    depends: set[fx.Node] = set()
    live: set[fx.Node] = set()
    found: list[fx.Node] = []
    width = 0
    for i, node in enumerate(nodes):
        if (node.op == "placeholder" and not depends) or (
            node.target is not torch.ops.aten.sym_size.int and depends.intersection(node.all_input_nodes)
        ):
            depends.add(node)
            features = _features(node)
            width = width or features
            if features >= width > 0:
                live.add(node)
        live = {other for other in live if last[other] > i}
        if live == {node} and _features(node) == width and str(node.target).split(".")[1:2] not in _COPIES:
            found.append(node)
    return found


def _features(node: fx.Node) -> int:
    """Size of the last dimension of a floating-point tensor; 0 for anything else."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim < 3:
        return 0
    return value.shape[-1] if isinstance(value.shape[-1], int) else 0


def errors(
    reference: fx.GraphModule, program: fx.GraphModule, where: Iterable[Point], batches: Iterable[Tensor]
) -> dict[str, float]:
    """Relative error at every point: the mean over tokens of `|y - y'| / |y|`, a token's features as one vector.

    The mean is over tokens, since in many models the first token's state is a thousand times as large as the others'
    and would dominate the error of the whole tensor.

    Args:
        reference, program: graphs of the model and of the program, with one token input.
        where: points; those missing in the program are left out.
        batches: token ids `[batch, sequence]`, at least one batch.

    Returns:
        Errors by node name.
    """
    wanted = {point.node for point in where} & {node.name for node in program.graph.nodes}
    total: dict[str, float] = defaultdict(float)
    tokens = 0
    for batch in batches:
        expected = _values(reference, wanted, batch)
        actual = _values(program, wanted, batch)
        tokens += batch.numel()
        for name, y in expected.items():
            if actual[name].shape == y.shape:
                norm = y.float().norm(dim=-1).clamp_min(1e-12)
                total[name] += float(((actual[name].float() - y.float()).norm(dim=-1) / norm).double().sum())
    return {name: value / tokens for name, value in total.items()}


def _values(graph_module: fx.GraphModule, wanted: set[str], batch: Tensor) -> Mapping[str, Any]:
    return values_of(
        graph_module, bind_batch(batch, get_state(graph_module).signature, device=device_of(graph_module)), wanted
    )
