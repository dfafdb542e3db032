"""`pack-weights`: stores integers instead of weights."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor, fx

from loopq_compile.graph.constants import chain_name, constant_nodes, evaluate
from loopq_compile.graph.insert import add_constant
from loopq_compile.graph.keys import SITE
from loopq_compile.graph.state import get_state, get_tensor
from loopq_compile.memory import release
from loopq_compile.operators import ops
from loopq_compile.passes.base import Pass, PassResult


class PackWeights(Pass):
    """Folds the constants before a linear into an integer weight and its scales.

    Before: `dequantize(quantize(chain, scale), scale)`, where `chain` and `scale` depend only on stored tensors: a
    weight, or the result of inverse transforms, rounding offsets and learned clip ratios. After: `dequantize(codes,
    scale)` with constants `<weight>_codes` (int8) and `<weight>_scale`, or `<weight>_loop<row>_codes` for a weight with
    a transform per loop. The floating-point weight, and all else that nothing reads any more, is removed.

    With `release_model`, the memory of a weight is freed as soon as its integers exist, also where only the captured
    graph still holds it.

    Does nothing to activations: their quantize nodes read values that are not constant.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        constant = constant_nodes(graph)
        quantized = [n for n in graph.nodes if n.target is ops.quantize.default and n in constant]
        scales = {n.args[1] for n in quantized if n.args[1].op != "get_attr"}
        names = _names(graph_module, quantized)
        targets = {*quantized, *scales}
        done_with = _last_readers(graph, constant, targets) if self.state(graph_module).run.release_model else {}
        for node, value in evaluate(graph_module, targets):
            _replace(graph_module, node, f"{names[node]}_{'scale' if node in scales else 'codes'}", value)
            release(get_tensor(graph_module, str(root.target)) for root in done_with.get(node, ()))
        if quantized:
            graph.eliminate_dead_code()
            drop_unused(graph_module)
            if self.state(graph_module).run.release_model:
                _release_captured(graph_module)
        return PassResult(graph_module, bool(quantized))


def _release_captured(graph_module: fx.GraphModule) -> None:
    """Frees quantized weights that only the captured graph still holds, as those behind latent weights."""
    state = get_state(graph_module)
    if state.run.teacher is None:
        return
    captured, kept = dict(_tensors(state.run.teacher)), {x.untyped_storage()._cdata for _, x in _tensors(graph_module)}
    weights = [
        captured[site.weight] for site in state.sites.values() if site.reason is None and site.weight in captured
    ]
    release(weight for weight in weights if weight.untyped_storage()._cdata not in kept)


def _tensors(module: fx.GraphModule) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _names(graph_module: fx.GraphModule, quantized: list[fx.Node]) -> dict[fx.Node, str]:
    """Names by quantize node and scale; a weight quantized in several ways gets numbers after its name."""
    seen: Counter[str] = Counter()
    names: dict[fx.Node, str] = {}
    for node in quantized:
        name = chain_name(graph_module, node)
        seen[name] += 1
        names[node] = name if seen[name] == 1 else f"{name}_{seen[name]}"
        names.setdefault(node.args[1], names[node])  # type: ignore[arg-type]
    return names


def _last_readers(graph: fx.Graph, constant: set[fx.Node], targets: set[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """By target, the stored tensors that it is the last to read; those that anything else reads are left out."""
    stored: dict[fx.Node, set[fx.Node]] = {}
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node in constant:
            below = [stored[argument] for argument in node.all_input_nodes]
            stored[node] = {node} if node.op == "get_attr" else set().union(*below)
        if node in targets:
            last |= dict.fromkeys(stored[node], node)
    stack, kept = [node for node in graph.nodes if node.op == "output"], set[fx.Node]()
    while stack:
        node = stack.pop()
        if node not in kept and node not in targets:
            kept.add(node)
            stack.extend(node.all_input_nodes)
    done_with: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for root, target in last.items():
        if root not in kept:
            done_with[target].append(root)
    return done_with


def _replace(graph_module: fx.GraphModule, node: fx.Node, name: str, value: Tensor) -> None:
    constant = add_constant(graph_module, name, value.clone(memory_format=torch.contiguous_format))
    constant.meta[SITE] = node.meta.get(SITE, "")
    node.replace_all_uses_with(constant)
    graph_module.graph.erase_node(node)


def drop_unused(graph_module: fx.GraphModule) -> None:
    """Removes stored tensors that no node reads."""
    used = {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}
    for owner_name, owner in graph_module.named_modules():
        for store in (owner._parameters, owner._buffers):
            for leaf in [leaf for leaf in store if (f"{owner_name}." if owner_name else "") + leaf not in used]:
                del store[leaf]
