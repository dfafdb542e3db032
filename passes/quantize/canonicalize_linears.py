"""`canonicalize-linears`: every product with a weight matrix becomes `aten.linear`."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, fx

from loopq_compile.graph.names import shown_name
from loopq_compile.graph.state import get_tensor, set_tensor
from loopq_compile.passes.base import Pass, PassResult

_aten = torch.ops.aten
_TRANSPOSES = {_aten.t.default, _aten.transpose.int, _aten.permute.default, _aten.numpy_T.default}
_PRODUCTS = {_aten.mm.default, _aten.matmul.default, _aten.addmm.default}


class CanonicalizeLinears(Pass):
    """Rewrites products with a weight as `aten.linear(x, weight, bias)` with the weight stored `[outputs, inputs]`.

    Before: `mm`, `matmul` and `addmm` with a weight or its transpose on the right, as functional code and GPT-2's
    `Conv1D` produce them. After: `aten.linear`.

    A weight used as `x @ w` is stored transposed, if every use of it is such a product. Otherwise (the weight is also
    an embedding, or is multiplied both ways) its products stay as they are. `addmm` with `alpha` or `beta` stays too.
    Does nothing to `aten.linear`.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        modified = False
        readers: dict[str, list[fx.Node]] = defaultdict(list)
        for node in graph.nodes:
            if node.op == "get_attr" and get_tensor(graph_module, str(node.target)).ndim == 2:
                readers[str(node.target)].append(node)
        for name, nodes in readers.items():
            modified |= self._rewrite_uses(graph_module, name, nodes)
        if modified:
            graph.eliminate_dead_code()
        return PassResult(graph_module, modified)

    def _rewrite_uses(self, graph_module: fx.GraphModule, name: str, readers: list[fx.Node]) -> bool:
        uses = [(reader, user) for reader in readers for user in reader.users]
        plain = [(reader, user) for reader, user in uses if _is_product(user, reader)]
        modified = False
        for reader, transpose in uses:
            if _is_transpose(transpose):
                for user in [user for user in transpose.users if _is_product(user, transpose)]:
                    _replace(user, reader)
                    modified = True
        if plain and len(plain) == len(uses):
            _store_transposed(graph_module, name, readers)
            for reader, user in plain:
                _replace(user, reader)
            return True
        if plain:
            self.state(graph_module).note(f"{shown_name(name)}: used in several forms, its products stay as they are")
        return modified


def _store_transposed(graph_module: fx.GraphModule, name: str, readers: list[fx.Node]) -> None:
    tensor: Tensor = get_tensor(graph_module, name)
    set_tensor(graph_module, name, tensor.detach().t().contiguous())
    for reader in readers:
        if "val" in reader.meta:
            reader.meta["val"] = reader.meta["val"].t()


def _is_transpose(node: fx.Node) -> bool:
    if node.target not in _TRANSPOSES:
        return False
    rest = node.args[1:]
    return rest in ((), ([1, 0],), ([-1, -2],)) or {int(dim) % 2 for dim in rest if isinstance(dim, int)} == {0, 1}


def _is_product(node: fx.Node, weight: fx.Node) -> bool:
    if node.target not in _PRODUCTS or node.args[-1] is not weight or node.args.count(weight) != 1:
        return False
    if node.target is _aten.addmm.default:
        bias = node.args[0]
        value = bias.meta.get("val") if isinstance(bias, fx.Node) else None
        return not node.kwargs and value is not None and value.ndim == 1
    return True


def _replace(product: fx.Node, weight: fx.Node) -> None:
    """Turns `product` into a linear layer; keeps its metadata (loop tag, module, source line)."""
    x = product.args[-2]
    bias = (product.args[0],) if product.target is _aten.addmm.default else ()
    product.target = _aten.linear.default
    product.args = (x, weight, *bias)
