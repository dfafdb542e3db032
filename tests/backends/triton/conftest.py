"""Kernels run on the CPU only where Triton was imported with TRITON_INTERPRET=1, and compile only where it was not.

`test_interpreter.py` starts a process of its own for the folder `interpreted`; to see its tests one by one:

    TRITON_INTERPRET=1 python -m pytest tests/backends/triton
"""

import os

collect_ignore_glob = ["test_*.py"] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted/*"]
