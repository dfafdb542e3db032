"""The kernels, one module for each operator of `loopq_compile.operators.packed`, and one for caches.

All are plain `triton.jit` functions without PyTorch: `loopq_compile.backends.triton.operators` launches them,
`loopq_compile.backends.triton.ahead` compiles them without a GPU.
"""

from loopq_compile.backends.triton.kernels.adapter import adapter_kernel
from loopq_compile.backends.triton.kernels.cache import attention_kernel, join_parts_kernel, write_cache_kernel
from loopq_compile.backends.triton.kernels.linear import linear_kernel, sum_parts_kernel
from loopq_compile.backends.triton.kernels.quantize import quantize_kernel

KERNELS = {
    "adapter_kernel": adapter_kernel,
    "attention_kernel": attention_kernel,
    "join_parts_kernel": join_parts_kernel,
    "linear_kernel": linear_kernel,
    "quantize_kernel": quantize_kernel,
    "sum_parts_kernel": sum_parts_kernel,
    "write_cache_kernel": write_cache_kernel,
}
"""By name, as saved programs refer to them."""
