"""Kernels run on the CPU only if Triton was imported with TRITON_INTERPRET=1, and compile only if it was not.

`test_interpreter.py` starts a separate process for the folder `interpreted`; to see its tests one by one:

    TRITON_INTERPRET=1 python -m pytest tests/backends/triton
"""

import os

collect_ignore_glob = ["test_*.py"] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted/*"]
