"""Plots the activation ranges that calibration found for every loop (figure 1 of the LoopQ paper).

pip install 'loopq-compile[plot]'
python examples/plot_ranges.py --out ranges.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from matplotlib.figure import Figure
from tiny_model import tiny_model, tokens

import loopq_compile as lq
from loopq_compile.analysis.summary import activation_rows


def main(arguments: Sequence[str] | None = None) -> dict[str, list[float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="ranges.png")
    options = parser.parse_args(arguments)
    data = [tokens(seed) for seed in range(4)]
    program = lq.compile(tiny_model(), tokens(), scheme="w8a8", method="las", activation="static", calibration=data)
    ranges = {group: rows.tolist() for group, rows in activation_rows(program.graph_module).items()}
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for group, rows in ranges.items():
        axes.plot(range(len(rows)), rows, marker="o", label=group)
    axes.set_xticks(range(program.loops.count))
    axes.set_xlabel("loop")
    axes.set_ylabel("largest range of a group")
    axes.legend(fontsize=7)
    figure.savefig(options.out, dpi=150)
    print(f"wrote {options.out}")
    return ranges


if __name__ == "__main__":
    main()
