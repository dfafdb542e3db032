"""Weights of products that are not linear layers: experts of a mixture, convolutions, computed weights. They stay in
floating point; the log, the summary and `inspect` name them."""

from __future__ import annotations

import re

import torch
from torch import fx

from loopq_compile.graph.names import shown_name
from loopq_compile.graph.recurrence import MATRIX_PRODUCTS
from loopq_compile.graph.state import get_state, get_tensor

_aten = torch.ops.aten
OTHER_PRODUCTS = "other products"
"""Key in `state.results`: by weight, why it stays in floating point."""
_NAMES_OF_PRODUCTS = re.compile(r"mm\b|mm_|mv\b|dot\b|conv|einsum|tensordot|bilinear")
_PASSED_ON = {
    *(_aten.index.Tensor, _aten.index_select.default, _aten.gather.default, _aten.select.int, _aten.slice.Tensor),
    *(_aten.view.default, _aten.reshape.default, _aten.expand.default, _aten.unsqueeze.default, _aten.squeeze.dim),
    *(_aten.t.default, _aten.transpose.int, _aten.permute.default, _aten.numpy_T.default, _aten.mT.default),
    *(_aten.to.dtype, _aten.to.other, _aten._to_copy.default, _aten.contiguous.default, _aten.clone.default),
}
"""Operators that pass on parts of a weight, chosen by data or not: `experts[chosen]`."""
_ADVICE = (
    "the weight is computed in the graph; to quantize it, store the result in the model, for instance by "
    "torch.nn.utils.parametrize.remove_parametrizations"
)


def other_products(graph_module: fx.GraphModule) -> dict[str, str]:
    """Why the weights of products without a `Site` stay in floating point, by weight, in order of use.

    A weight has at least two dimensions. For one computed from several parameters the names are joined by `+`.
    """
    sites = get_state(graph_module).sites
    carried: dict[fx.Node, frozenset[str]] = {}
    found: dict[str, str] = {}
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            tensor = get_tensor(graph_module, str(node.target))
            if tensor.is_floating_point() and tensor.ndim >= 2:
                carried[node] = frozenset([str(node.target)])
            continue
        inputs = [argument for argument in node.all_input_nodes if argument in carried]
        if node.op != "call_function" or not inputs:
            continue
        if _hands_on(node, carried):
            carried[node] = frozenset().union(*(carried[argument] for argument in inputs))
        elif node.target in MATRIX_PRODUCTS or _NAMES_OF_PRODUCTS.search(str(node.target)):
            for argument in inputs:
                weight = "+".join(sorted(carried[argument]))
                if weight not in sites:
                    found.setdefault(shown_name(weight), _why(graph_module, node, argument, carried[argument]))
    return found


def _hands_on(node: fx.Node, carried: dict[fx.Node, frozenset[str]]) -> bool:
    if node.target in _PASSED_ON:
        return node.args[0] in carried
    return all(a in carried or a.op == "get_attr" for a in node.all_input_nodes)  # computed only from weights


def _why(graph_module: fx.GraphModule, node: fx.Node, argument: fx.Node, names: frozenset[str]) -> str:
    tensors = [get_tensor(graph_module, name) for name in sorted(names)]
    sizes = ", ".join(" x ".join(map(str, tensor.shape)) for tensor in tensors)
    count = sum(tensor.numel() for tensor in tensors)
    linear = node.target is _aten.linear.default and argument is node.args[1]
    return f"{_ADVICE if linear else f'{node.target} is not a linear layer'} ({sizes}: {count:,} parameters)"
