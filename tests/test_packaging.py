"""Built packages contain what is in the repository."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def packages_on_disk():
    found = set()
    for top, prefix in (
        ("loopq_compile", "loopq_compile"),
        ("passes", "loopq_compile.passes"),
        ("backends", "loopq_compile.backends"),
    ):
        for init in (ROOT / top).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT / top).parts
            found.add(".".join((prefix, *parts)))
    return found


def test_every_package_is_listed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert set(listed) == packages_on_disk()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from the source distribution, as `pip install` from an index would."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_the_wheel_holds_passes_backends_and_the_bundled_model(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "loopq_compile/py.typed",
        "loopq_compile/passes/loops/tag_loops.py",
        "loopq_compile/backends/onnx/__init__.py",
        "loopq_compile/bundled/model.safetensors",
        "loopq_compile/bundled/tokenizer.json",
        "loopq_compile/bundled/MODEL_CARD.md",
    } <= names
    assert not [name for name in names if name.startswith(("tests/", "passes/", "backends/", "examples/"))]


def test_the_bundled_data_fits_the_wheel(wheel):
    bundled = [item for item in zipfile.ZipFile(wheel).infolist() if item.filename.startswith("loopq_compile/bundled/")]
    assert sum(item.file_size for item in bundled) < 8 * 2**20


def test_an_installed_wheel_imports_and_runs_from_another_folder(wheel, tmp_path):
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    script = (
        f"import sys; sys.path.insert(0, {str(target)!r})\n"
        "import loopq_compile, loopq_compile.passes, loopq_compile.backends, loopq_compile.cli\n"
        "from loopq_compile import bundled\n"
        f"assert all(m.__file__.startswith({str(target)!r}) for m in (loopq_compile, loopq_compile.passes, bundled))\n"
        "print(type(bundled.load_model()).__name__)\n"
    )
    # -S would also hide the dependencies; the editable install is kept out by the order of sys.path.
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "Ouro"
