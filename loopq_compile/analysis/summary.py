"""The summary of a program: loops by modules."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx

from loopq_compile.graph.keys import GROUP, TRANSFORM
from loopq_compile.graph.scheme import quantized_range
from loopq_compile.graph.state import CompilerState, Site, get_state, get_tensor
from loopq_compile.operators import ops
from loopq_compile.passes.quantize.other_products import OTHER_PRODUCTS
from loopq_compile.passes.transforms.conditioning import condition_numbers

_PARTS = (
    "integer weights",
    "per-loop weights",
    "their scales",
    "per-loop tables",
    "transforms",
    "adapters",
    "compensation",
    "floating point",
)


def summarize(graph_module: fx.GraphModule) -> str:
    """Loops by modules as text: bits, parameters, and for each loop the activation range or mean clip ratio."""
    state = get_state(graph_module)
    lines = [f"{state.model_name}: {state.loops.describe()}"]
    if not state.loops.loops:
        lines.append("No loop was found: this is ordinary post-training quantization.")
    if state.scheme:
        lines.append(
            f"{state.scheme.name}, groups of {state.scheme.group_size}, {state.scheme.activation} activation scales, "
            f"method {state.method}"
        )
    if state.sites:
        lines += ["", _site_table(graph_module, state)]
    others = state.results.get(OTHER_PRODUCTS, {})
    lines += [f"{weight} stays in floating point: {why}" for weight, why in others.items()]
    lines.append(_totals(graph_module, state))
    conditions = condition_numbers(graph_module)
    if conditions:
        worst = max(conditions, key=conditions.__getitem__)
        lines.append(f"transforms: condition numbers up to {conditions[worst]:.3g} ({worst})")
    return "\n".join(lines)


def activation_rows(graph_module: fx.GraphModule) -> dict[str, Tensor]:
    """By group, the range of each table row (static) or its mean clip ratio (dynamic): `[rows]`."""
    scheme = get_state(graph_module).scheme
    rows: dict[str, Tensor] = {}
    for node in graph_module.graph.nodes:
        if GROUP in node.meta and scheme is not None:
            table = get_tensor(graph_module, str(node.target)).float()
            static = scheme.activation == "static"
            values = table.amax(1) * quantized_range(scheme.activation_bits)[1] if static else table.mean(1)
            rows[node.meta[GROUP]] = values
    return rows


def short_names(names: Sequence[str]) -> list[str]:
    """Names of modules, without the prefix that all of them share."""
    parts = [name.split(".") for name in names]
    same = 0
    while parts and all(len(path) > same + 1 and path[same] == parts[0][same] for path in parts):
        same += 1
    return [".".join(path[same:]) for path in parts]


def _site_table(graph_module: fx.GraphModule, state: CompilerState) -> str:
    rows = activation_rows(graph_module)
    count = max([len(values) for values in rows.values()], default=0)
    what = "range" if state.scheme and state.scheme.activation == "static" else "clip"
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("module", "weights", "shape", "parameters"):
        table.add_column(title, justify="right" if title == "parameters" else "left", no_wrap=True)
    for row in range(count):
        table.add_column(f"{what} {row}" if count > 1 else what, justify="right")
    for site in state.sites.values():
        table.add_row(*_site_row(state, site, rows.get(site.group), count))
    out = io.StringIO()
    Console(file=out, width=60 + 12 * max(count, 4) + max(len(site.name) for site in state.sites.values())).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _site_row(state: CompilerState, site: Site, values: Tensor | None, count: int) -> list[str]:
    outputs, inputs = site.shape
    start = [site.name, f"w{state.scheme.weight_bits}" if state.scheme and not site.reason else "float"]
    start += [f"{outputs} x {inputs}", f"{outputs * inputs:,}"]
    if site.reason:
        return start + ([site.reason] + [""] * (count - 1) if count else [])
    if values is None:
        return start + [""] * count
    shown = [f"{value:.4g}" for value in values.tolist()]
    return start + (shown if len(shown) == count else ["(all) " + shown[0]] + [""] * (count - 1))


def _totals(graph_module: fx.GraphModule, state: CompilerState) -> str:
    """Parameters and memory by part."""
    parts: dict[str, list[float]] = {part: [0, 0.0] for part in _PARTS}
    for node in graph_module.graph.nodes:
        if node.op != "get_attr":
            continue
        tensor = get_tensor(graph_module, str(node.target))
        part, bits = _part(node, tensor), 8.0 * tensor.element_size()
        if part in ("integer weights", "per-loop weights") and state.scheme:
            bits = float(state.scheme.weight_bits)
        parts[part][0] += tensor.numel()
        parts[part][1] += tensor.numel() * bits / 8
    shown = [f"{part} {count:,} ({size / 2**20:.2f} MiB)" for part, (count, size) in parts.items() if count]
    return "parameters: " + ", ".join(shown)


def _part(node: fx.Node, tensor: Tensor) -> str:
    """Which of `_PARTS` a stored tensor belongs to."""
    name = str(node.target)
    if tensor.dtype == torch.int8 and name.endswith("_codes"):
        return "per-loop weights" if re.search(r"_loop[\d_]+_codes$", name) else "integer weights"
    if TRANSFORM in node.meta:
        return "transforms"
    if any(user.target is ops.transition_adapter.default for row in (node, *node.users) for user in row.users):
        return "adapters"
    parts = [(row, user) for row in (node, *node.users) for user in row.users]
    if any(user.target is ops.compensate.default and row in user.args[2:] for row, user in parts):
        return "compensation"
    if GROUP in node.meta:
        return "per-loop tables"
    return "their scales" if name.endswith("_scale") else "floating point"
