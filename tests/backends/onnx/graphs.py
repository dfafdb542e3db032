"""Small looped models and hand-made quantized graphs for the tests of the ONNX backend.

The nodes are inserted here, not by passes, so that these tests define what the backend accepts.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import torch
from torch import Tensor, fx, nn

from loopq_compile.capture.to_graph import capture
from loopq_compile.graph.loops import get_tag, set_tag
from loopq_compile.graph.scheme import quantized_range
from loopq_compile.graph.state import get_tensor, set_tensor
from loopq_compile.passes.loops.tag_loops import TagLoops

_aten, _loopq = torch.ops.aten, torch.ops.loopq


class Recurrent(nn.Module):
    """A shared gated layer, `loops` times, causal through a running mean; tied or untied head."""

    def __init__(self, loops: int = 2, bias: bool = False, tied: bool = True, width: int = 48) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.loops = loops
        self.embed = nn.Embedding(80, width)
        self.norm = nn.RMSNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width, bias=bias), nn.Linear(2 * width, width, bias=bias)
        self.head = nn.Linear(width, 80, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        steps = torch.arange(1, input_ids.shape[1] + 1).unsqueeze(-1)
        for _ in range(self.loops):
            x = self.norm(x + self.down(torch.tanh(self.up(x)).cumsum(1) / steps))
        return self.head(x)


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Token ids `[batch, length]` below 80."""
    return torch.randint(0, 80, (batch, length), generator=torch.Generator().manual_seed(seed))


def captured(model: nn.Module, example: object = None) -> fx.GraphModule:
    """A captured and tagged graph."""
    graph_module = capture(model.eval(), (tokens(2, 12),) if example is None else example)
    TagLoops()(graph_module)
    return graph_module


def quantized(
    graph_module: fx.GraphModule,
    weight_bits: int = 4,
    activation_bits: int = 4,
    group_size: int = 16,
    activation: str = "static",
    per_tensor: bool = False,
    shared: bool = False,
    skip: str = "head",
    signed: bool = True,
) -> fx.GraphModule:
    """Inserts quantized weights and activations for every linear whose weight's name lacks `skip`."""
    torch.manual_seed(1)
    linears: dict[fx.Node, list[fx.Node]] = {}
    for node in graph_module.graph.nodes:
        is_weight = node.target is _aten.linear.default and node.args[1].op == "get_attr"
        if is_weight and skip not in node.args[1].target and "embed" not in node.args[1].target:
            linears.setdefault(node.args[1], []).append(node)
    for weight, calls in linears.items():
        _quantize_site(
            graph_module,
            weight,
            calls,
            weight_bits,
            activation_bits,
            group_size,
            activation,
            per_tensor,
            shared,
            signed,
        )
    graph_module.graph.eliminate_dead_code()
    graph_module.graph.lint()
    graph_module.recompile()
    return graph_module


def _quantize_site(
    graph_module, weight, calls, weight_bits, bits, group_size, activation, per_tensor, shared, signed
) -> None:  # type: ignore[no-untyped-def]
    graph, name = graph_module.graph, weight.target
    values = get_tensor(graph_module, name).detach()
    size = values.shape[1] if group_size == -1 else group_size
    q_min, q_max = quantized_range(weight_bits)
    scale = (values.unflatten(-1, (-1, size)).abs().amax(-1) / q_max).clamp_min(1e-12)
    set_tensor(graph_module, f"{name}_codes", _loopq.quantize(values, scale, size, q_min, q_max))
    set_tensor(graph_module, f"{name}_scale", scale)
    with graph.inserting_before(calls[0]):
        parts = graph.get_attr(f"{name}_codes"), graph.get_attr(f"{name}_scale"), size
        dequantized = graph.call_function(_loopq.dequantize.default, parts)
    dequantized.meta.update({"loopq_bits": weight_bits, "loopq_site": name.removesuffix(".weight")})
    table = None
    q_min, q_max = quantized_range(bits)
    if bits < 16:
        rows, columns = 1 if shared else len(calls), 1 if per_tensor else values.shape[1] // size
        spread = torch.rand(rows, columns) * 0.5 + 0.5
        set_tensor(graph_module, f"{name}_table", spread * 2 / q_max if activation == "static" else spread)
        with graph.inserting_before(calls[0]):
            table = graph.get_attr(f"{name}_table")
    for loop, call in enumerate(calls):
        x = call.args[0]
        if table is not None:
            with graph.inserting_before(call):
                row = graph.call_function(_aten.select.int, (table, 0, 0 if shared else loop))
                scales = row
                if activation == "dynamic":
                    scales = graph.call_function(
                        _loopq.dynamic_scale.default, (x, row, size, q_min if signed else q_max)
                    )
                codes = graph.call_function(_loopq.quantize.default, (x, scales, size, q_min, q_max))
                x = graph.call_function(_loopq.dequantize.default, (codes, scales, size))
            for node in {row, scales, codes, x}:
                set_tag(node, get_tag(call))
                node.meta["loopq_site"] = name.removesuffix(".weight")
        call.args = (x, dequantized, *call.args[2:])


def in_float32(path: Path) -> Path:
    """The same file, changed to multiply in float32 where ONNX Runtime would first round to 8 bits."""
    model = onnx.load(path)
    graphs = [model.graph]
    for graph in graphs:
        for attribute in (attribute for node in graph.node for attribute in node.attribute):
            if attribute.name == "accuracy_level":
                attribute.i = 1
            elif attribute.HasField("g"):  # the body of a loop
                graphs.append(attribute.g)
    onnx.save(model, path.with_name("float32.onnx"))
    return path.with_name("float32.onnx")
