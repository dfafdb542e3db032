"""Parameters and memory of a program by part, and how many of them differ between loops."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import fx

from loopq_compile.graph.loops import LoopTag, get_tag
from loopq_compile.graph.state import get_state, get_tensor
from loopq_compile.operators import ops

WEIGHTS, SCALES, COPIES = "quantized weights", "their scales", "weights of single loops, with scales"
LOOP, SHARED, FLOAT = "loop-dependent tables", "added, shared by all loops", "floating point"
PARTS = (WEIGHTS, SCALES, COPIES, LOOP, SHARED, FLOAT)


@dataclass
class Part:
    """Parameters of one part; bytes as stored, and with floating point in 16 bits, as models are deployed."""

    count: int = 0
    stored: float = 0.0
    deployed: float = 0.0


def by_part(captured: fx.GraphModule, program: fx.GraphModule) -> dict[str, Any]:
    """Parts of a program, compared with the model in 16 bits.

    Args:
        captured: the graph of the model in full precision.
        program: the graph of the program.

    Returns:
        `{"model": {...}, "parts": {name: {"count", "stored", "deployed"}}, "share": s, "share with copies": c}`; the
        shares are loop-dependent parameters relative to the model's, in percent, without and with the separate
        weights of single loops.
    """
    original = {str(node.target) for node in _constants(captured)}
    model = sum(get_tensor(captured, name).numel() for name in original)
    parts = {name: Part() for name in PARTS}
    scheme = get_state(program).scheme
    for name, node in {str(node.target): node for node in _constants(program)}.items():
        tensor = get_tensor(program, name)
        bits = 8.0 * tensor.element_size()
        part = parts[_part(program, node, name, original)]
        if name.endswith("_codes"):
            bits = float(scheme.weight_bits if scheme else 8)
        part.count += tensor.numel()
        part.stored += tensor.numel() * bits / 8
        part.deployed += tensor.numel() * (min(bits, 16.0) if tensor.is_floating_point() else bits) / 8
    extra = parts[LOOP].count
    return {
        "model": {"count": model, "deployed": 2.0 * model},
        "parts": {name: asdict(part) for name, part in parts.items()},
        "share": 100 * extra / model,
        "share with copies": 100 * (extra + parts[COPIES].count) / model,
    }


def _constants(graph_module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph_module.graph.nodes if node.op == "get_attr"]


def _part(program: fx.GraphModule, node: fx.Node, name: str, original: set[str]) -> str:
    """An added tensor is loop-dependent if loops read rows of it, or if not all loops read it."""
    if name in original:
        return FLOAT
    loops = get_state(program).loops
    tags = _readers(node)
    count = max((loops.iterations(tag) for tag in tags), default=1)
    single = count > 1 and len({loops.row(tag) for tag in tags}) < count
    if name.endswith("_codes"):
        return COPIES if single else WEIGHTS
    if name.endswith("_scale") and f"{name.removesuffix('_scale')}_codes" in _names(program):
        return COPIES if single else SCALES
    rows = any(user.target is torch.ops.aten.select.int for user in node.users)
    return LOOP if single or (rows and len(get_tensor(program, name)) > 1) else SHARED


def _names(program: fx.GraphModule) -> set[str]:
    return {str(node.target) for node in _constants(program)}


def _readers(node: fx.Node) -> set[LoopTag | None]:
    """Tags of the nodes that read a stored tensor, directly or through untagged nodes computed from it."""
    tags: set[LoopTag | None] = set()
    stack = [user for user in node.users if user.op != "output"]
    seen: set[fx.Node] = set()
    while stack:
        user = stack.pop()
        if user in seen:
            continue
        seen.add(user)
        if get_tag(user) is None and user.target is ops.dequantize.default:
            stack.extend(user.users)
        else:
            tags.add(get_tag(user))
    return tags
