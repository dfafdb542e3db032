"""The demo: takes the bundled looped language model from PyTorch to text from ONNX Runtime."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from torch import Tensor

from loopq_compile import bench, bundled
from loopq_compile.backends.onnx.folder import KIND, MODEL_FILE
from loopq_compile.bench.demo_figures import check_document, figures, rewrite
from loopq_compile.evaluation.perplexity import Remembered, evaluate
from loopq_compile.generation.sampling import generate
from loopq_compile.generation.tokenizer import TOKENIZER_FILE, tokenize
from loopq_compile.graph.options import CalibrationOptions
from loopq_compile.graph.scheme import Scheme
from loopq_compile.program import Program
from loopq_compile.sources.loading import Loaded, save_beside
from loopq_compile.storage.artifact import FILES, save
from loopq_compile.storage.atomic import check_folder, write_results
from loopq_compile.storage.manifest import PROGRAM, RESULTS, listed

RUNS = (
    ("symmetric", "w4a4", "static"),
    ("las", "w4a4", "static"),
    ("symmetric", "w4a4", "dynamic"),
    ("symmetric", "w4a8", "dynamic"),
    ("loopq", "w4a4", "dynamic"),
)
"""Method, scheme and activation scales of the measured variants, cheapest first."""
EXPORTED = ("loopq", "w4a4", "dynamic")
"""The variant that is exported: the package's defaults, and the most difficult of the four-bit variants."""
LENGTH, STRIDE = 256, 128
PROMPT = "Return a new array with the same shape and type as"


@dataclass
class Demo:
    """One run of the demo.

    Args:
        out: folder for all output.
        max_tokens: held-out tokens to measure on.
        samples, sample_length: size of the calibration data.
        steps: optimizer steps of `loopq`.
        new_tokens: length of the generated texts.
        readme: a document whose figures this run rewrites, see `demo_figures`; None for none.
        console: where progress is printed.
    """

    out: Path
    max_tokens: int = 16384
    samples: int = 512
    sample_length: int = 128
    steps: int = 36
    new_tokens: int = 40
    readme: Path | None = None
    console: Console = field(default_factory=Console)
    written: list[tuple[Path, str]] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)

    def run(self) -> dict[str, Any]:
        """Takes all steps, and returns the figures.

        Raises:
            LoopQError: the output folder or the document cannot be written, or the package data is damaged.
        """
        start = time.perf_counter()
        check_folder(self.out, RESULTS, ("program.py", "quality.json", "quality.md"))
        check_folder(self.out / "program", PROGRAM, (*FILES, TOKENIZER_FILE))
        check_folder(self.out / "onnx", KIND, (MODEL_FILE, TOKENIZER_FILE))
        if self.readme is not None:
            check_document(self.readme)
        model, tokenizer = bundled.load_model(), bundled.load_tokenizer()
        weights = sum(parameter.numel() for parameter in model.parameters())
        self._say(f"The bundled looped language model: {weights / 1e6:.2f} million parameters, {type(model).__name__}.")
        self._capture(model)
        tokens, source = self._held_out(tokenizer)
        program = self._quality(model, tokens, source)
        report = self._save_and_export(program, tokenizer)
        executable = self._compare(model, program, report, tokens)
        self._generate(program, executable, tokenizer)
        self._close(time.perf_counter() - start)
        return self.results

    def _step(self, title: str) -> None:
        self.console.print()
        self.console.rule(title, align="left", style="cyan")

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def _capture(self, model: Any) -> None:
        from loopq_compile.capture.to_graph import capture
        from loopq_compile.graph.shapes import infer_shapes
        from loopq_compile.passes.loops.tag_loops import TagLoops
        from loopq_compile.pipeline import Pipeline

        self._step("1. Capture")
        self._say(
            "torch.export turns the model into one unrolled graph; its loops are found from how weights are reused."
        )
        start = time.perf_counter()
        graph_module = Pipeline([TagLoops()]).run(capture(model))
        infer_shapes(graph_module)
        program = Program(graph_module)
        seconds = time.perf_counter() - start
        nodes = [node for node in graph_module.graph.nodes if node.op == "call_function"]
        self._say(f"captured {len(nodes)} operations in {seconds:.1f} s; loops: {program.loops.describe()}")
        rows = []
        for edge in program.loops.boundaries:
            rows.append((f"{edge.source} -> {edge.target}", ", ".join(edge.state), ", ".join(edge.consumers)))
        self._table(("loop transition", "recurrent state", "read by"), rows, 3)
        self.results |= {
            "loops": program.loops.describe(),
            "operations": len(nodes),
            "capture_seconds": round(seconds, 1),
        }

    def _held_out(self, tokenizer: Any) -> tuple[Tensor, str]:
        self._step("2. Quality")
        held_out = bundled.held_out_text()
        every = tokenize(tokenizer, held_out.text)
        tokens = every[: self.max_tokens]
        source = f"{held_out}; measured on the first {len(tokens):,} of {len(every):,} tokens"
        self._say(
            "Each variant is calibrated on documentation that the model was trained on, and measured on documentation "
            "that it never saw."
        )
        self._say(source)
        return tokens, source

    def _quality(self, model: Any, tokens: Tensor, source: str) -> Program:
        calibration = bundled.calibration_tokens(self.samples, self.sample_length)
        options = CalibrationOptions(steps=self.steps)
        others = [run for run in RUNS if run != EXPORTED]
        spawn = multiprocessing.get_context("spawn")
        with _one_thread(), ProcessPoolExecutor(1, mp_context=spawn) as pool:  # faster than two threads for one process
            beside = pool.submit(_rows, others, tokens, calibration, options)
            (base, _), (last, kept) = _measured(model, [EXPORTED], tokens, calibration, options)
            rows = [base, *beside.result(), last]
        for row in rows:
            name = " ".join(filter(None, (row.method, row.scheme, row.activation)))
            seconds = row.quantize_seconds + row.eval_seconds
            self._say(f"  {name}: perplexity {row.perplexity:.2f} ({seconds:.0f} s)")
        self._table(bench.COLUMNS, [row.cells() for row in rows], 3)
        about = {"text": source, "length": LENGTH, "stride": STRIDE, "samples": self.samples, "steps": self.steps}
        for path in bench.write_results(rows, self.out, "Quality of the bundled model", **about):
            self.written.append((path, "the table above"))
        self.results |= {"quality": [row.__dict__ for row in rows], **about}
        assert kept is not None
        return kept

    def _save_and_export(self, program: Program, tokenizer: Any) -> Any:
        self._step("3. The program, saved and exported")
        self._say(f"{' '.join(EXPORTED)} goes on. One loop transition of its printed graph:")
        from loopq_compile.graph.printer import print_transition

        transition = print_transition(program.graph_module, context=2)
        self.console.print(Syntax("", "python", background_color="default").highlight(transition), soft_wrap=True)
        write_results(self.out, {"program.py": str(program)})
        save(program.graph_module, self.out / "program", {TOKENIZER_FILE: tokenizer.to_str()})
        report = program.export_onnx(self.out / "onnx", target="qdq", form="unrolled")
        save_beside(Loaded(program, tokenizer), self.out / "onnx")
        self._say("\nExported to ONNX; the file passed onnx.checker with full shape inference:")
        self._say(str(report))
        sizes = {
            "model in fp32": sum(p.numel() * 4 for p in _weights(bundled.load_model())),
            "saved program": sum(entry["bytes"] for entry in listed(self.out / "program", PROGRAM).values()),
            "ONNX file": report.bytes,
        }
        self._table(("size", "MB"), [(name, f"{size / 1e6:.2f}") for name, size in sizes.items()], 1)
        self.written += [
            (self.out / "program.py", "the whole graph as Python, to read"),
            (self.out / "program", "the quantized program; loopq_compile.load() reads it"),
            (self.out / "onnx", "model.onnx and its tokenizer"),
        ]
        self.results |= {"bytes": sizes, "onnx_nodes": report.nodes, "integer_weights": report.integer_weights}
        return report

    def _compare(self, model: Any, program: Program, report: Any, tokens: Tensor) -> Any:
        from loopq_compile.backends.onnx import OnnxExecutable

        self._step("4. The ONNX file beside the program")
        executable = OnnxExecutable(report.path)
        part = tokens[: max(2, len(tokens) // 4)]
        reference = Remembered(program)
        scores = {"program (PyTorch)": evaluate(reference, part, length=LENGTH, stride=STRIDE, title="program")}
        scores["ONNX Runtime"] = evaluate(
            executable, part, teacher=reference, length=LENGTH, stride=STRIDE, title="ONNX Runtime"
        )
        self._say(
            f"Both on the first {len(part):,} held-out tokens. Their sums differ in the last bit, which now and then "
            "rounds a four-bit code the other way; the distance beside the ONNX file is what comes of it."
        )
        cells = []
        for name, score in scores.items():
            distance = ("", "") if score.kl is None else (f"{score.kl:.2e}", f"{score.agreement:.2%}")
            cells.append((name, f"{score.perplexity:.3f}", *distance, f"{score.seconds:.1f}"))
        self._table(("runs in", "perplexity", "KL to program", "top-1 agreement", "seconds"), cells, 1)
        self.results["onnx"] = {name: score.to_dict() for name, score in scores.items()}
        return executable

    def _generate(self, program: Program, executable: Any, tokenizer: Any) -> None:
        self._step("5. Text out of ONNX Runtime")
        ids = tokenize(tokenizer, PROMPT).unsqueeze(0)
        greedy = generate(executable, ids, self.new_tokens)
        equal = greedy == program.generate(ids, self.new_tokens)
        same, count = int(equal[0].long().cumprod(0).sum()) - ids.shape[1], greedy.shape[1] - ids.shape[1]
        sampled = generate(executable, ids, self.new_tokens, do_sample=True, temperature=0.8, top_p=0.9, seed=0)
        for name, result in (("greedy", greedy), ("sampled (temperature 0.8, top-p 0.9, seed 0)", sampled)):
            self.console.print(f"[bold]{name}[/]")
            self._say("  " + tokenizer.decode(result[0].tolist()).replace("\n", "\n  "))
        self._say(f"Of the {count} greedy tokens, the first {same} are the same as the program's in PyTorch.")
        self.results |= {
            "greedy_same": same,
            "greedy_count": count,
            "greedy": greedy[0].tolist(),
            "sampled": sampled[0].tolist(),
        }

    def _close(self, seconds: float) -> None:
        self._step(f"Done in {seconds:.0f} s")
        self.results["seconds"] = round(seconds, 1)
        if self.readme is not None:
            rewrite(self.readme, figures(self.results))
            self.written.append((self.readme, "its figures are those of this run"))
        self._table(("written", "what"), [(str(path), what) for path, what in self.written], 2)
        self._say("\nTo try next:")
        self._say(f"  loopq-compile inspect {self.out / 'program'} --loop 1 --dot loop.dot")
        self._say(f'  loopq-compile generate {self.out / "onnx"} --prompt "{PROMPT}" --do-sample --top-p 0.9')
        self._say(f"  loopq-compile eval bundled {self.out / 'program'} {self.out / 'onnx'} --max-tokens 2048")
        self._say("  loopq-compile compile bundled --scheme w3a6 --activation static --out my-program")

    def _table(self, columns: Any, rows: Any, text_columns: int) -> None:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for i, name in enumerate(columns):
            table.add_column(name, justify="left" if i < text_columns else "right", overflow="fold")
        for row in rows:
            table.add_row(*row)
        self.console.print()
        self.console.print(table)


def _weights(model: Any) -> list[Tensor]:
    return list(model.parameters())


def _measured(
    model: Any, runs: Sequence[tuple[str, str, str]], tokens: Tensor, calibration: Any, options: CalibrationOptions
) -> list[tuple[bench.QualityRow, Program | None]]:
    """The rows of full precision and of some variants, with their programs."""
    variants = [bench.Variant(method, Scheme.parse(scheme, activation=scales)) for method, scheme, scales in runs]
    return list(bench.quality(model, tokens, variants, calibration, length=LENGTH, stride=STRIDE, options=options))


def _rows(
    runs: Sequence[tuple[str, str, str]], tokens: Tensor, calibration: Any, options: CalibrationOptions
) -> list[bench.QualityRow]:
    """The rows of some variants of the bundled model; runs in a process of its own."""
    os.environ["TTY_COMPATIBLE"] = "0"  # progress bars of two processes would write over each other
    with _one_thread():
        return [row for row, _ in _measured(bundled.load_model(), runs, tokens, calibration, options)][1:]


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Inside, PyTorch computes with one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
