"""The figures of the demo in a document, written by the run that measured them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loopq_compile.errors import LoopQError

BEGIN, END = "<!-- figures of the demo: begin -->", "<!-- figures of the demo: end -->"
"""The lines of a document that enclose its figures."""
COLUMNS = ("method", "scheme", "scales", "perplexity", "ratio", "KL to full precision", "top-1 agreement")


def figures(results: Mapping[str, Any]) -> str:
    """The text of a document about one run, as Markdown.

    Args:
        results: what `Demo.run` returns.
    """
    lines = ["| " + " | ".join(COLUMNS) + " |", "| --- | --- | --- | ---: | ---: | ---: | ---: |"]
    for row in results["quality"]:
        distance = ("", "") if row["kl"] is None else (f"{row['kl']:.4f}", f"{row['agreement']:.1%}")
        cells = (row["method"], row["scheme"], row["activation"], f"{row['perplexity']:.3f}", f"{row['ratio']:.3f}")
        lines.append("| " + " | ".join((*cells, *distance)) + " |")
    size, scores = results["bytes"], results["onnx"]
    program, runtime = scores["program (PyTorch)"], scores["ONNX Runtime"]
    integers = ", ".join(f"{count} {kind}" for kind, count in results["integer_weights"].items())
    lines += [
        "",
        f"Measured on {results['text']}.",
        f"Methods that calibrate read {results['samples']} passages of training text; `loopq` took "
        f"{results['steps']} steps.",
        "",
        f"The exported file has {size['ONNX file'] / 1e6:.2f} MB (the model in fp32: "
        f"{size['model in fp32'] / 1e6:.2f} MB), {sum(results['onnx_nodes'].values()):,} nodes and {integers} weights. "
        f"On {runtime['tokens']:,} of these tokens it scores {runtime['perplexity']:.3f} in ONNX Runtime, the program "
        f"{program['perplexity']:.3f} (KL {runtime['kl']:.1e}, {runtime['agreement']:.1%} of the most likely tokens "
        f"equal). Of {results['greedy_count']} greedy tokens the first {results['greedy_same']} are the program's.",
    ]
    return "\n".join(lines)


def check_document(file: str | os.PathLike[str]) -> None:
    """Checks, before minutes of work, whether `rewrite` will succeed.

    Raises:
        LoopQError: the file cannot be read, or lacks one of the two marks.
    """
    _parts(Path(file))


def rewrite(file: str | os.PathLike[str], text: str) -> None:
    """Puts `text` between the marks of a document; everything else stays.

    Raises:
        LoopQError: as `check_document`; or the file cannot be written.
    """
    before, after = _parts(Path(file))
    try:
        Path(file).write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
    except OSError as error:
        raise LoopQError(f"Cannot write to {file}: {error.strerror or error}.") from error


def _parts(file: Path) -> tuple[str, str]:
    """The text before and after the figures."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LoopQError(f"Cannot read {file}: {getattr(error, 'strerror', None) or 'it is not UTF-8'}.") from error
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise LoopQError(f"{file} lacks the lines {BEGIN!r} and {END!r}; put them around its figures.")
    return before, after
