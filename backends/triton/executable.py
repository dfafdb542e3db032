"""`lower`: turns a program into a module that runs on fused kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from loopq_compile.backends.triton.configurations import (
    HIGHEST_RANK,
    LONGEST_SIDE,
    WIDEST_HEAD,
    WIDEST_PLAIN,
    WIDEST_TILE,
)
from loopq_compile.backends.triton.copies import on_device, put_on
from loopq_compile.backends.triton.operators import INTERPRETED
from loopq_compile.backends.triton.static_decoder import StaticDecoder, capture_cuda_graph, check_cuda_graphs
from loopq_compile.errors import LoopQError
from loopq_compile.graph.copies import private_copy
from loopq_compile.graph.state import get_state
from loopq_compile.operators import ops
from loopq_compile.passes.fuse.fuse_adapters import FuseAdapters
from loopq_compile.passes.fuse.fuse_attention import FuseAttention
from loopq_compile.passes.fuse.fuse_linears import FuseLinears
from loopq_compile.passes.fuse.fusion import RESULTS, Entry, Limits
from loopq_compile.passes.loops.roll_loops import RollLoops
from loopq_compile.pipeline import Pipeline

_LIMITS = Limits((32, 64, 128), WIDEST_PLAIN, WIDEST_TILE, LONGEST_SIDE)
_OLDEST = (8, 0)
_NAMES = ("quantize_packed", "packed_linear", "transition_adapter_row", "quantize_cache", "cached_attention")


class TritonExecutable(nn.Module):
    """A lowered program: called like the model it was compiled from.

    It is an ordinary module without model code, so it goes through `torch.compile` and `torch.cuda.graph`.

    Args:
        graph_module: the fused graph, on its device.
        device: where inputs are moved to.
        kernels: False if definitions in PyTorch run instead of kernels (`fallback=True` without a GPU).
    """

    def __init__(self, graph_module: fx.GraphModule, device: torch.device, kernels: bool) -> None:
        super().__init__()
        self.graph_module, self.device, self.kernels = graph_module, device, kernels
        self.signature = get_state(graph_module).signature
        lines = get_state(graph_module).results.get(RESULTS, [])
        self.report = [Entry(**line | {"parts": tuple(line["parts"])}) for line in lines]
        """What was fused, and why the rest was not: an `Entry` for every place."""
        self.loops = get_state(graph_module).loops.count

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns for the same call, on the executable's device.

        Raises:
            LoopQError: the arguments do not fit the captured call.
        """
        inputs = [value.to(self.device) for value in self.signature.bind(args, kwargs)]
        with torch.no_grad(), on_device(self.device):
            return self.signature.restore(self.graph_module(*inputs))

    def static_decoder(self, capacity: int = 2048, *, cuda_graph: bool = True) -> StaticDecoder:
        """A decoder with fixed shapes: a step with all loops is one CUDA graph. For `generation.sampling.generate`.

        Args:
            capacity: most tokens of prompt and continuation together. A step reads only the filled part of an integer
                cache, and all of a floating-point cache.
            cuda_graph: False runs the step launch by launch, on any device.

        Raises:
            LoopQError: there is no GPU, or the program has no key-value cache (`program.with_cache(last_token=True)`).
        """
        if cuda_graph:
            check_cuda_graphs()
        return StaticDecoder(self, capacity, capture_cuda_graph if cuda_graph else None)


def lower(
    program: Any, *, fallback: bool = False, rolled: bool = False, device: str | torch.device | None = None
) -> TritonExecutable:
    """Fuses a private copy of a `Program` (or graph module) and moves it to a GPU.

    Args:
        program: a program with packed weights and quantized activations, not rolled.
        fallback: if no kernel can run (no GPU, or an old one), run the fused graph's definitions in PyTorch, slowly. If
            nothing can be fused, run the graph unchanged.
        rolled: whether the iterations of every loop become one body that gets the loop's number as argument, so that
            the graph does not grow with the loops. Its transition adapters run in PyTorch.
        device: a CUDA device, by default the current one; the CPU in Triton's interpreter and for the fallback.

    Raises:
        LoopQError: there is no GPU that can run the kernels, or nothing in the program can be fused; the message says
            what to do.
    """
    target = device_for(device, fallback)
    kernels = target.type == "cuda" or INTERPRETED
    graph_module = fuse(program, rolled=rolled, may_fail=fallback)
    if kernels:
        use_kernels(graph_module)
    return TritonExecutable(put_on(graph_module, target), target, kernels).to(target)


def fuse(program: Any, *, rolled: bool = False, may_fail: bool = False) -> fx.GraphModule:
    """A private copy of a program that uses the `loopq::` operators with a kernel.

    Args:
        program, rolled: as for `lower`.
        may_fail: whether to return the copy unchanged if nothing can be fused.

    Raises:
        LoopQError: nothing can be fused, or iterations differ and cannot be rolled; the message says why.
    """
    passes = [FuseLinears(_LIMITS), FuseAttention(WIDEST_HEAD), RollLoops() if rolled else FuseAdapters(HIGHEST_RANK)]
    graph_module = Pipeline(passes, "triton").run(private_copy(getattr(program, "graph_module", program)))
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            node.meta.pop("val", None)
    lines = get_state(graph_module).results.get(RESULTS, [])
    if not any(line["parts"] for line in lines) and not may_fail:
        reasons = "; ".join(sorted({line["reason"] for line in lines})) or "it has no quantized linear"
        raise LoopQError(
            f"No kernel fits this program: {reasons}. Compile it with packed weights and quantized activations, "
            f"such as scheme='w4a4', leave rolling to lower(rolled=True), or pass fallback=True to run it in PyTorch."
        )
    return graph_module


def device_for(wanted: str | torch.device | None, fallback: bool) -> torch.device:
    """Where to run.

    Raises:
        LoopQError: the kernels cannot run there, and there is no fallback.
    """
    device = torch.device(wanted) if wanted is not None else None
    if INTERPRETED:
        return device or torch.device("cpu")
    hint = "Run on an NVIDIA GPU with compute capability 8.0 or newer; or pass fallback=True to run the kernels' "
    hint += (
        "definitions in PyTorch; or set TRITON_INTERPRET=1 before Python starts to interpret them on the CPU (slow)."
    )
    if not torch.cuda.is_available():
        problem = "Backend 'triton' found no NVIDIA GPU."
    elif device is not None and device.type != "cuda":
        problem = f"Backend 'triton' does not run on device {str(device)!r}."
    elif (capability := torch.cuda.get_device_capability(device)) < _OLDEST:
        name = torch.cuda.get_device_name(device)
        problem = f"{name} has compute capability {capability[0]}.{capability[1]}; the kernels need 8.0."
    else:
        return device or torch.device("cuda", torch.cuda.current_device())
    if not fallback:
        raise LoopQError(f"{problem} {hint}")
    return device if device is not None and device.type != "cuda" else torch.device("cpu")


def use_kernels(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Turns fused operators into launches, in place, and makes constants that kernels read contiguous."""
    kernels = {getattr(ops, name).default: getattr(torch.ops.loopq_triton, name).default for name in _NAMES}
    for module in graph_module.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                node.target = kernels.get(node.target, node.target)
            module.graph.lint()
            module.recompile()
        for name, tensor in list(module._buffers.items()):
            if isinstance(tensor, Tensor):
                module._buffers[name] = tensor.contiguous()
    return graph_module
