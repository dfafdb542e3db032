"""The operators that passes put into a graph, `torch.ops.loopq.*`. Importing this package registers them.

Each operator has its schema, shape function and PyTorch definition in one place. The definition *is* the meaning;
backends are tested against it. If PyTorch has a standard operator (the row of a per-loop table is
`aten.select.int`), the graph uses that. `quantized_decomposed::quantize_per_channel_group` was not usable: it takes
two-dimensional inputs and one scale table per channel, neither of which fits activations.
"""

import torch

from loopq_compile.operators.adapter import transition_adapter
from loopq_compile.operators.cache import cached_attention, dequantize_cache, quantize_cache
from loopq_compile.operators.compensation import compensate
from loopq_compile.operators.latent import from_latent
from loopq_compile.operators.packed import packed_linear, quantize_packed, transition_adapter_row
from loopq_compile.operators.quantize import dequantize, dynamic_scale, offset, quantize
from loopq_compile.operators.straight_through import fake_quantize, fake_quantize_dynamic
from loopq_compile.operators.transform import kronecker

ops = torch.ops.loopq
"""The registered operators, as they occur in graphs: `ops.quantize.default` and so on."""

__all__ = [
    "cached_attention",
    "compensate",
    "dequantize",
    "dequantize_cache",
    "dynamic_scale",
    "fake_quantize",
    "fake_quantize_dynamic",
    "from_latent",
    "kronecker",
    "offset",
    "ops",
    "packed_linear",
    "quantize",
    "quantize_cache",
    "quantize_packed",
    "transition_adapter",
    "transition_adapter_row",
]
