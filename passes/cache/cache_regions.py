"""Which nodes of a causal language model depend on tokens, and which only on their number.

With a key-value cache, a call takes only the *new* tokens, and keys and values of the *past* ones. So every node of
the graph belongs to one of these regions:

- `sizes`: whole numbers computed from the sequence length;
- `positions`: tensors computed from the sequence length or the attention mask, without reading a token: causal
  masks, rotary tables, learned positions. They are computed for past and new tokens;
- `tokens`: what is computed from tokens; in a graph with a cache, from the new ones. Only attention may mix tokens
  here;
- constants, which are in none of these.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from loopq_compile.errors import LoopQError
from loopq_compile.graph.evaluate import call_node, sources_of
from loopq_compile.graph.loops import get_tag
from loopq_compile.graph.shapes import infer_shapes
from loopq_compile.graph.signature import InputSpec
from loopq_compile.graph.state import get_state

_aten = torch.ops.aten
ATTENTION_MASK = "attention_mask"
"""Name of the input `[batch, sequence]` that is 0 on padding."""

_POINTWISE = {
    *(_aten.to.dtype, _aten.to.device, _aten.to.dtype_layout),
    *(_aten.__and__.Tensor, _aten.__or__.Tensor, _aten.__xor__.Tensor),
}
"""Pointwise operators that PyTorch does not mark as such."""


def is_pointwise(node: fx.Node) -> bool:
    """Whether `node` computes each number only from those at the same place."""
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or node.target in _POINTWISE


def shape_of(node: Any) -> tuple[Any, ...]:
    """Sizes of a node's tensor; () if it is not a tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def where(node: fx.Node) -> str:
    """A node, its loop and its source line, for messages."""
    tag, line = get_tag(node), (node.meta.get("stack_trace") or "").strip().splitlines()[-2:]
    place = f" in loop {tag.label}" if tag else ""
    return f"node {node.name!r} ({node.target}){place}: {' '.join(part.strip() for part in line) or 'no source line'}"


@dataclass
class Regions:
    """The regions of a graph.

    Args:
        graph_module: a captured graph with shapes.
        ids: the tokens' placeholder; `mask`: that of the attention mask, or None.
        symbol: the symbol of the sequence length in the graph's shapes.
    """

    graph_module: fx.GraphModule
    ids: fx.Node
    mask: fx.Node | None
    symbol: Any
    sizes: set[fx.Node]
    positions: set[fx.Node]
    tokens: set[fx.Node]

    def carries(self, size: Any) -> bool:
        """Whether a size depends on the sequence length."""
        expression = getattr(getattr(size, "node", None), "expr", None)
        return expression is not None and self.symbol in expression.free_symbols

    def axes(self, node: Any) -> list[int]:
        """The axes of a node's tensor that run over the sequence."""
        return [axis for axis, size in enumerate(shape_of(node)) if self.carries(size)]

    def is_length(self, node: Any) -> bool:
        """Whether a size is the sequence length itself."""
        value = node.meta.get("val") if isinstance(node, fx.Node) else None
        return getattr(getattr(value, "node", None), "expr", None) == self.symbol

    def compute(self, targets: Iterable[fx.Node], length: int) -> dict[fx.Node, Tensor]:
        """The values of `targets` (nodes of positions) for two rows of `length` tokens without padding."""
        wanted = list(targets)
        needed = sources_of(wanted)
        values: dict[fx.Node, Any] = {}
        for node in self.graph_module.graph.nodes:
            if node in needed and node.op == "placeholder":
                values[node] = torch.ones(2, length, dtype=node.meta["val"].dtype, device=node.meta["val"].device)
            elif node in needed:
                values[node] = call_node(self.graph_module, node, values.__getitem__)
        return {node: values[node] for node in wanted}


def find_regions(graph_module: fx.GraphModule) -> Regions:
    """Sorts the nodes of a graph into regions.

    Raises:
        LoopQError: the graph does not take token ids `[batch, sequence]` and at most an attention mask.
    """
    infer_shapes(graph_module)
    ids, mask = _inputs(graph_module)
    symbol = ids.meta["val"].shape[1].node.expr
    found = Regions(graph_module, ids, mask, symbol, set(), set(), {ids})
    for node in graph_module.graph.nodes:
        if node.op != "call_function":
            continue
        value, inputs = node.meta.get("val"), node.all_input_nodes
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            if found.carries(value) or any(argument in found.sizes for argument in inputs):
                found.sizes.add(node)
        elif any(argument in found.tokens for argument in inputs):
            found.tokens.add(node)
        elif any(argument in found.positions or argument in found.sizes or argument is mask for argument in inputs):
            found.positions.add(node)
    return found


def _inputs(graph_module: fx.GraphModule) -> tuple[fx.Node, fx.Node | None]:
    specs: tuple[InputSpec, ...] = get_state(graph_module).signature.inputs
    nodes = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    pairs = list(zip(specs, nodes, strict=True))
    ids = [node for spec, node in pairs if _is_tokens(spec) and spec.name != ATTENTION_MASK]
    masks = [node for spec, node in pairs if spec.name == ATTENTION_MASK and _is_tokens(spec)]
    if len(ids) != 1 or len(ids) + len(masks) != len(pairs):
        raise LoopQError(
            "A key-value cache needs a model that takes token ids [batch, sequence] and, if it likes, "
            f"{ATTENTION_MASK} [batch, sequence]; this program takes ({', '.join(map(str, specs))})."
        )
    return ids[0], masks[0] if masks else None


def _is_tokens(spec: InputSpec) -> bool:
    named = len(spec.shape) == 2 and isinstance(spec.shape[1], str)
    return named and spec.shape[1] == "sequence" and not spec.dtype.is_floating_point
