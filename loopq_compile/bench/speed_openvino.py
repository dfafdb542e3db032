"""OpenVINO in `bench speed`: it runs our own export, and a rival whose weights NNCF compressed to 4 bits.

`python -m loopq_compile.bench.speed_openvino SOURCE FILE GROUP_SIZE HEAD_BITS` makes the rival's file from an export in
full precision.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from loopq_compile.backends.openvino import OpenVinoExecutable
from loopq_compile.bench.processes import run_module
from loopq_compile.errors import first_line
from loopq_compile.generation.decoders import Decoder

WAYS: Mapping[str, dict[str, Any]] = {
    "openvino": {},
    "openvino float32": {"INFERENCE_PRECISION_HINT": "f32"},
}
"""What OpenVINO is told by name of the way. By default it computes in bfloat16 where the processor has that."""


def decoders(file: Path, way: str) -> Callable[[], Decoder]:
    """A function that makes fresh decoders of an export or of a file from `write`, on one thread."""
    return OpenVinoExecutable(file, threads=1, **WAYS[way]).decoder


def write(source: Path, file: Path, group_size: int, head_bits: int) -> None:
    """Makes the rival's file in a process of its own.

    Args:
        source: the model as `Program.export_openvino` writes it in full precision, attention fused, cache inside.
        file: `.xml` to write, with a `.bin` beside it.
        group_size: neighbouring weights that share a scale.
        head_bits: 8 or 4, of embeddings and head.

    Raises:
        LoopQError: OpenVINO or NNCF fails.
    """
    arguments = [str(source), str(file), str(group_size), str(head_bits)]
    run_module("speed_openvino", *arguments, failed="OpenVINO could not compress the model")


def compress(source: Path, file: Path, group_size: int, head_bits: int) -> None:
    """What `write` does, in this process."""
    import nncf
    import openvino

    model = openvino.Core().read_model(str(source))
    mode = nncf.CompressWeightsMode.INT4_SYM
    model = nncf.compress_weights(model, mode=mode, group_size=group_size, ratio=1.0, all_layers=head_bits == 4)
    openvino.save_model(model, str(file), compress_to_fp16=False)


if __name__ == "__main__":
    try:
        compress(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    except Exception as error:  # one line for the table
        sys.exit(f"{type(error).__name__}: {first_line(error)}")
