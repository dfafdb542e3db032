"""What a program stores, under the model's names, and in which order its layers run."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from loopq_compile.errors import LoopQError
from loopq_compile.graph.names import shown_name
from loopq_compile.graph.state import get_state, get_tensor
from loopq_compile.operators import ops

LAYER = re.compile(r"(.*\blayers\.\d+)\.(.+)")
"""The name of a layer, and of a part of it."""


@dataclass(frozen=True)
class Stored:
    """A tensor of the program.

    Args:
        values: the tensor, or integers `[N, K]`, int8.
        scale: of integers, `[N, groups]`.
    """

    values: Tensor
    scale: Tensor | None = None


@dataclass
class Contents:
    """Tensors of a program by the model's parameter names, in order of first use.

    Args:
        tensors: weights, gains, biases and tables.
        uses: how often each is read.
        order: by position, the name of the layer that runs there, such as `("model.layers.0", "model.layers.0")`.
    """

    tensors: dict[str, Stored] = field(default_factory=dict)
    uses: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    order: tuple[str, ...] = ()


def read_contents(graph_module: fx.GraphModule) -> Contents:
    """Reads weights, and the order of layers from the order in which the graph uses them.

    Raises:
        LoopQError: parts of a layer run in different orders, so that no list of layers describes the program.
    """
    contents = Contents()
    weights = {f"{site.weight}_codes": site.weight for site in get_state(graph_module).sites.values()}
    runs: dict[str, list[str]] = defaultdict(list)
    for node in graph_module.graph.nodes:
        if node.op != "call_function" or _is_weight(node):
            continue
        for argument in node.all_input_nodes:
            found = _stored(graph_module, argument, weights)
            if found is None:
                continue
            name, stored = found
            contents.tensors.setdefault(name, stored)
            contents.uses[name] += 1
            if layer := LAYER.fullmatch(name):
                runs[layer[2]].append(layer[1])
    orders = {tuple(run): part for part, run in runs.items()}
    if len(orders) > 1:
        one, other = (f"{part} runs in order {list(order)}" for order, part in list(orders.items())[:2])
        name = get_state(graph_module).model_name
        raise LoopQError(f"llama.cpp runs whole layers. In {name}, {one}, {other}; export the program as ONNX.")
    contents.order = next(iter(orders), ())
    return contents


def _is_weight(node: fx.Node) -> bool:
    """Whether a node turns stored integers into a weight."""
    argument: Any = node.args[0] if node.args else None
    return node.target is ops.dequantize.default and isinstance(argument, fx.Node) and argument.op == "get_attr"


def _stored(graph_module: fx.GraphModule, node: fx.Node, weights: dict[str, str]) -> tuple[str, Stored] | None:
    if node.op == "get_attr":
        return shown_name(str(node.target)), Stored(get_tensor(graph_module, str(node.target)).detach())
    if not _is_weight(node):
        return None
    targets = [str(argument.target) for argument in node.all_input_nodes]
    codes, scale = (get_tensor(graph_module, target) for target in targets)
    return shown_name(weights.get(targets[0], targets[0])), Stored(codes, scale)
