"""The tensors of a folder: what the engine's model loads, from the program or, if nothing reads them, the source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from loopq_compile.backends.compressed_tensors.configuration import PACKED, Grid
from loopq_compile.backends.compressed_tensors.packing import pack, positive
from loopq_compile.backends.compressed_tensors.skeleton import Skeleton
from loopq_compile.backends.compressed_tensors.source import Source
from loopq_compile.backends.plain import METHOD, PlainLinear
from loopq_compile.errors import LoopQError
from loopq_compile.graph.keys import MADE_BY
from loopq_compile.graph.names import shown_name
from loopq_compile.graph.state import get_state, get_tensor

_WEIGHT = ".weight"


class TensorWriter:
    """Collects tensors under the names by which the engine loads them.

    Attributes:
        tensors: by name.
        grids: by name of a quantized linear.
        change: largest change of a scale by rounding it to the type of the files, relative to it.
    """

    def __init__(
        self, graph_module: fx.GraphModule, linears: list[PlainLinear], grids: Mapping[str, Grid], dtype: Any
    ) -> None:
        self._linears = {shown_name(linear.site.weight): linear for linear in linears}
        self._weight_grids, self._dtype = grids, dtype
        self._aliases = get_state(graph_module).origin.aliases
        self._floats = _floats(graph_module)
        self._shared: set[int] = set()
        self.tensors: dict[str, Tensor] = {}
        self.grids: dict[str, Grid] = {}
        self.change = 0.0

    def add_all(self, skeleton: Skeleton, source: Source) -> None:
        """Adds every tensor of the engine's model.

        Raises:
            LoopQError: the program has one that the engine's model lacks, one has another shape, or nobody has it.
        """
        missing: dict[str, torch.Size] = {}
        used: set[str] = set()
        for name, shape in skeleton.stored.items():
            module, first = name.removesuffix(_WEIGHT), self._aliases.get(name, name)
            if first in self._linears and module in skeleton.linears:
                self._check(name, self._linears[first].codes, shape)
                self._add_linear(module, first)
                used.add(first)
            elif (found := self._floats.get(first)) is not None:
                self._check(name, found, shape)
                self._add(name, found)
            else:
                missing[name] = shape
        if left := sorted(set(self._linears) - used):
            raise LoopQError(
                f"{left[0]!r} is quantized, and {type(skeleton.model).__name__} has no nn.Linear of that name, which "
                "is what compressed-tensors quantizes. Leave it out with skip=(...), or export the program as ONNX."
            )
        self._add_missing(missing, source)

    def _check(self, name: str, found: Tensor, shape: torch.Size) -> None:
        if found.shape != shape:
            raise LoopQError(
                f"The program's {name!r} has shape {list(found.shape)}, the model of its configuration {list(shape)}. "
                "The configuration was changed after compiling; compile again."
            )

    def _add_missing(self, missing: Mapping[str, torch.Size], source: Source) -> None:
        found = source.tensors(missing) if missing else {}
        for name, shape in missing.items():
            if name not in found:
                raise LoopQError(
                    f"The model has {name!r}, which the program does not need and does not hold, but engines load it. "
                    "Name the model that was compiled, or its folder: source=FOLDER (--source FOLDER)."
                )
            self._check(name, found[name], shape)
            self._add(name, found[name])

    def _add_linear(self, name: str, first: str) -> None:
        linear, grid = self._linears[first], self._weight_grids[first]
        codes, scale, zero_point = positive(linear.codes, linear.scale, grid.symmetric)
        if grid.format == PACKED:
            self.tensors[f"{name}.weight_packed"] = pack(codes, grid.bits).cpu()
            self.tensors[f"{name}.weight_shape"] = torch.tensor(codes.shape)
            if not grid.symmetric:
                # Zero points are packed along the outputs.
                self.tensors[f"{name}.weight_zero_point"] = pack(zero_point.T, grid.bits).T.contiguous().cpu()
        else:
            self.tensors[f"{name}.weight"] = codes.clone().cpu()
        stored = scale.to(self._dtype or scale.dtype)
        if not torch.isfinite(stored).all():
            raise LoopQError(f"{name!r} holds a scale that {self._dtype} does not. Use dtype='bfloat16' or 'float32'.")
        self.change = max(self.change, float(((stored.double() - scale) / scale).abs().max()))
        self.tensors[f"{name}.weight_scale"] = stored.clone().cpu()
        self.grids[name] = grid

    def _add(self, name: str, value: Tensor) -> None:
        value = value.detach().cpu()
        if value.is_floating_point() and self._dtype is not None:
            value = value.to(self._dtype)
        pointer = value.untyped_storage().data_ptr()  # tensors of a file may not share memory
        whole = (
            value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes and pointer not in self._shared
        )
        self.tensors[name] = value if whole else value.clone(memory_format=torch.contiguous_format)
        self._shared.add(pointer)


def _floats(graph_module: fx.GraphModule) -> dict[str, Tensor]:
    """Stored tensors of the program by the model's names."""
    return {
        shown_name(str(node.target)): get_tensor(graph_module, str(node.target))
        for node in graph_module.graph.nodes
        if node.op == "get_attr"
    }


def check_places(graph_module: fx.GraphModule, skeleton: Skeleton) -> None:
    """Refuses tensors that quantization added, other than integers and their scales, and clip ratios of 1.

    Raises:
        LoopQError: names one.
    """
    names = {*skeleton.stored, *(name for name, _ in skeleton.model.named_buffers())}
    for node in graph_module.graph.nodes:
        name = shown_name(str(node.target))
        known = name in names or name.endswith(("_codes", "_scale")) or "activation_clip" in name
        if node.op == "get_attr" and MADE_BY in node.meta and not known:
            raise LoopQError(
                f"compressed-tensors has no place for {name!r}, which the pass {node.meta[MADE_BY]} made. Compile "
                f"the model with method={METHOD!r}."
            )
