"""Kernels run on the CPU only if Triton was imported with TRITON_INTERPRET=1, and compile only if it was not.

`test_interpreter.py` starts a separate process for the folder `interpreted`; to see its tests one by one:

    TRITON_INTERPRET=1 python -m pytest tests/backends/triton

The same tests run on a GPU with LOOPQ_KERNELS=cuda in its place; `python -m tests.gpu` does that.
"""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    collect_ignore_glob = ["test_*.py"]
elif "LOOPQ_KERNELS" in os.environ:
    collect_ignore_glob = []
else:
    collect_ignore_glob = ["interpreted/*"]
