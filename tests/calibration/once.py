"""`python -m tests.calibration.once OUT OPTIONS`: one calibration of the tiny model in a separate process.

Everything that was learned goes to OUT as safetensors. OPTIONS is JSON: fields of `CalibrationOptions`.
"""

from __future__ import annotations

import json
import sys

import torch.distributed as dist
from safetensors.torch import save_file

from loopq_compile.calibration.distributed import world
from loopq_compile.passes.learn.calibrate import Calibrate
from tests.calibration.tools import learned_tensors, prepared


def main() -> None:
    out, options = sys.argv[1], json.loads(sys.argv[2])
    graph_module = prepared(Calibrate(), **options)
    if world()[0] == 0:
        save_file(learned_tensors(graph_module), out)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
