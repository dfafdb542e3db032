"""The result of the passes on a loop transition, compared with the text stored next to this test.

The text is exact for the PyTorch release it was made with; with others, the operators, loops and sites are compared.
After a deliberate change, `python -m tests.passes.test_golden` writes it again.
"""

import re
from pathlib import Path

import torch

from loopq_compile.graph.printer import print_transition
from tests.tiny import tiny_program

GOLDEN = Path(__file__).parent / "golden" / "las_transition.txt"
RELEASE = "2.14"


def transition():
    return print_transition(tiny_program("w4a4", "las", "static").graph_module, context=8) + "\n"


def outline(text):
    """Operators, loops and sites without node names."""
    return re.findall(r"torch\.ops\.([\w.]+)\(.*# (loop=\d+ site=\S+)", text)


def test_a_loop_transition_prints_as_before():
    expected, got = GOLDEN.read_text(), transition()
    assert outline(got) == outline(expected)
    assert len(outline(got)) > 10
    if torch.__version__.startswith(RELEASE):
        assert got == expected


if __name__ == "__main__":
    GOLDEN.write_text(transition())
