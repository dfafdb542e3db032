"""The package runs from a checkout that nobody installed, on a machine that has few other packages."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
MISSING = ["rich", "typer", "psutil", "tokenizers", "onnx", "onnx_ir", "onnxscript", "onnxruntime"]
MISSING += ["hypothesis", "matplotlib", "gguf", "torchao", "datasets", "lm_eval"]
SCRIPT = """
import sys
from importlib.machinery import PathFinder

sys.path[:0] = {paths}


class Present(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {missing} else super().find_spec(name, path, target)


sys.meta_path = [Present if finder is PathFinder else finder for finder in sys.meta_path]
{script}
"""


def alone(script: str, missing: list[str]) -> str:
    """What a script prints without `.pth` files, and so without an editable installation of this package."""
    paths = [str(ROOT), *(path for path in sys.path if path and Path(path).resolve() != ROOT)]
    content = SCRIPT.format(paths=json.dumps(paths), missing=missing, script=script)
    done = subprocess.run([sys.executable, "-I", "-S", "-c", content], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_a_checkout_has_its_passes_and_backends():
    script = (
        "import loopq_compile\nimport loopq_compile.passes.loops.tag_loops as one\n"
        "import loopq_compile.backends.triton.configurations as two\n"
        "assert not any('__editable__' in str(finder) for finder in sys.meta_path)\n"
        "print(loopq_compile.__file__, one.__file__, two.__file__, sep='\\n')\n"
    )
    found = [Path(line).resolve() for line in alone(script, []).splitlines()]
    files = ("loopq_compile/__init__.py", "passes/loops/tag_loops.py", "backends/triton/configurations.py")
    assert found == [ROOT / name for name in files]


def test_compiling_needs_neither_onnx_nor_what_the_command_line_needs():
    """What a GPU machine without a way to install anything has: torch, transformers, safetensors, triton."""
    script = (
        "from tests.tiny import tiny_program, tokens\n"
        "program = tiny_program('w4a4', 'symmetric')\n"
        "run = program.lower('triton', fallback=True)\n"
        "print(run(tokens())['logits'].shape)\n"
    )
    assert alone(script, MISSING) == "torch.Size([2, 16, 64])"
