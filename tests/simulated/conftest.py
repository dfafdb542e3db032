"""PyTorch cannot forget a kind of device, and asks it in every operator: these tests have a process of their own.

`tests/test_simulated.py` starts it; to see the tests one by one:

    LOOPQ_SIMULATED=1 python -m pytest tests/simulated
"""

import os

collect_ignore_glob = [] if os.environ.get("LOOPQ_SIMULATED") == "1" else ["test_*.py"]
