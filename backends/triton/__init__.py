"""The Triton backend: fused kernels on packed 4-bit weights, for NVIDIA GPUs from compute capability 8.0 on.

The passes `fuse-linears`, `fuse-attention` and `fuse-adapters` rewrite a private copy of the program with
`loopq::quantize_packed`, `loopq::packed_linear`, `loopq::cached_attention` and `loopq::transition_adapter_row`;
`operators` launches a kernel for each; `ahead` compiles them without a GPU; `saved` stores them with the program.
"""

from loopq_compile.backends.triton.executable import TritonExecutable, lower
from loopq_compile.backends.triton.saved import load, save

__all__ = ["TritonExecutable", "load", "lower", "save"]
