"""Runs a quick part of the tests with the oldest and the newest releases that the package admits.

    python -m tests.matrix                    # both; `make matrix` does this
    python -m tests.matrix card               # the releases of a GPU machine; every name is a key of PAIRS

Each pair has an environment of its own in `.venv-matrix/`, made on the first run: some 5 GB, several minutes. It prints
a row of the table in CONTRIBUTING.md for each pair.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAIRS = {
    "oldest": ["torch==2.11.0", "transformers==4.56.2", "numpy<2.4"],
    "newest": ["torch<2.16", "transformers", "triton"],
    "card": ["torch==2.11.0", "transformers==5.17.0", "onnxruntime==1.30.*", "onnx==1.23.1", "numpy<2.4"],
}
"""By name, what pip gets beside the package; torch names its release of triton.

The interpreter of Triton 3.6 takes arrays of one number as numbers, which NumPy 2.4 refuses.
"""
TESTS = [
    "tests/test_checkout.py",
    "tests/operators/test_operators.py",
    "tests/capture/test_capture.py::test_what_models_do_inside_is_captured",
    "tests/capture/test_transformers.py",
    "tests/graph/test_verify.py",
    "tests/passes/test_rewrite.py",
    "tests/passes/loops/test_tag_loops.py",
    "tests/passes/loops/test_roll_loops.py",
    "tests/passes/quantize/test_quantize_weights.py",
    "tests/calibration/test_steps.py",
    "tests/storage/test_artifact.py",
    "tests/generation/test_sampling.py",
    "tests/generation/test_transformers_model.py",
    "tests/backends/onnx/test_file.py",
    "tests/backends/onnx/test_rolled.py",
    "tests/backends/triton/test_interpreter.py",
    "tests/backends/triton/test_lower.py",
    "tests/cli/test_cli.py::test_every_command_has_help",
    "tests/cli/test_cli.py::test_compile_writes_program_and_tokenizer",
    "tests/cli/test_cli.py::test_export_reports_what_it_wrote",
    "tests/cli/test_cli.py::test_generate_from_model_program_and_onnx",
]
"""What releases of PyTorch, transformers and Triton are most likely to change, from every room."""
VERSIONS = "torch", "transformers", "triton", "onnxruntime", "onnx"
_PRINT = "import sys; from importlib.metadata import version as v; print('%d.%d' % sys.version_info[:2], *map(v, {!r}))"


def python_of(name: str, folder: Path) -> Path:
    """Python of a pair's environment, which is made if it is missing."""
    home = folder / name
    python, ready = home / "bin" / "python", home / ".ready"
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        packages = ["--editable", ".[triton]", "pytest>=8", "hypothesis>=6.100", *PAIRS[name]]
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True, cwd=ROOT)
        ready.touch()
    return python


def run(name: str, folder: Path, tests: list[str]) -> tuple[str, bool]:
    """A row of the table, and whether all tests passed; shows what pytest prints."""
    python, start = python_of(name, folder), time.monotonic()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(folder / name / "inductor")}
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    print(done.stdout[-8000:], flush=True)
    asked = subprocess.run([str(python), "-c", _PRINT.format(VERSIONS)], capture_output=True, text=True, check=True)
    counts = re.findall(r"\d+ (?:passed|failed|skipped|error)", done.stdout.splitlines()[-1])
    minutes = f"{(time.monotonic() - start) / 60:.1f} min"
    return f"| {' | '.join(asked.stdout.split())} | {', '.join(counts)} | {minutes} |", done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *PAIRS], help="pairs, by default oldest and newest")
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv-matrix", help="where environments are kept")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="tests to run instead of the quick part")
    options = parser.parse_args()
    found = [run(name, options.folder.resolve(), options.tests) for name in options.names or ("oldest", "newest")]
    print(f"| Python | {' | '.join(VERSIONS)} | quick part | time |\n|{' --- |' * (len(VERSIONS) + 3)}")
    print("\n".join(row for row, _ in found))
    return 0 if all(passed for _, passed in found) else 1


if __name__ == "__main__":
    sys.exit(main())
