"""The kernels, one module for each operator of `loopq_compile.operators.packed`.

All are plain `triton.jit` functions without PyTorch: `loopq_compile.backends.triton.operators` launches them,
`loopq_compile.backends.triton.ahead` compiles them without a GPU.
"""
