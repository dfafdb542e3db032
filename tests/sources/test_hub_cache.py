"""Models, programs and exports as the Hugging Face hub's cache stores them: links into `blobs`; and with hard links."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

import loopq_compile as lq
from loopq_compile.backends.onnx import OnnxExecutable, export
from loopq_compile.backends.onnx.folder import verify
from loopq_compile.cli import app
from loopq_compile.sources.loading import load_model
from loopq_compile.storage.artifact import save
from tests.cli_models import tiny_llama, tokenizer
from tests.tiny import tiny_program, tokens


def cache(source: Path, home: Path, name: str) -> Path:
    """Puts a folder into a cache of the hub, as a download would, and returns its snapshot."""
    owner = home / "hub" / f"models--org--{name}"
    snapshot = owner / "snapshots" / "0123abc"
    for folder in (owner / "blobs", owner / "refs", snapshot):
        folder.mkdir(parents=True)
    (owner / "refs" / "main").write_text("0123abc")
    for file in source.iterdir():
        blob = owner / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program, an export with weights in a separate file, and a Hugging Face model."""
    folder = tmp_path_factory.mktemp("outputs")
    program = tiny_program("w4a8", "symmetric")
    save(program.graph_module, folder / "program", {"tokenizer.json": tokenizer().to_str()})
    export(program.graph_module, folder / "onnx", external_data_threshold=100)
    tiny_llama().save_pretrained(folder / "llama")
    return folder


@pytest.fixture
def home(outputs: Path, tmp_path: Path) -> Path:
    for source in outputs.iterdir():
        cache(source, tmp_path / "home", source.name)
    return tmp_path / "home"


def snapshot(home: Path, name: str) -> Path:
    return home / "hub" / f"models--org--{name}" / "snapshots" / "0123abc"


def check(name: str, folder: Path) -> None:
    """Reads an output in every possible way."""
    if name == "program":
        assert lq.load(folder).scheme.name == "w4a8" and load_model(folder).tokenizer is not None
    elif name == "onnx":
        assert verify(folder).unlisted == ()
        assert OnnxExecutable(folder)(tokens())["logits"].isfinite().all()
    else:
        assert load_model(folder).kind == "model"
    if name != "llama":
        done = CliRunner().invoke(app, ["verify", str(folder)])
        assert done.exit_code == 0, done.output


@pytest.mark.parametrize("name", ["program", "onnx", "llama"])
def test_links_into_the_blobs_of_the_same_model_are_files(home: Path, name: str, tmp_path: Path) -> None:
    check(name, snapshot(home, name))
    (tmp_path / "link").symlink_to(snapshot(home, name))
    check(name, tmp_path / "link")


@pytest.mark.parametrize("name", ["program", "onnx", "llama"])
def test_files_with_several_names_are_files(outputs: Path, name: str, tmp_path: Path) -> None:
    shutil.copytree(outputs / name, tmp_path / "copy", copy_function=os.link)
    check(name, tmp_path / "copy")


def test_a_program_in_a_folder_of_a_repository(outputs: Path, home: Path) -> None:
    below = snapshot(home, "llama") / "w4a8"
    below.mkdir()
    for file in (outputs / "program").iterdir():
        shutil.copy(file, home / "hub" / "models--org--llama" / "blobs" / file.name)
        (below / file.name).symlink_to(f"../../../blobs/{file.name}")
    check("program", below)


def to_secret(home: Path, link: Path) -> None:
    link.symlink_to(home.parent / "secret")


def to_another_model(home: Path, link: Path) -> None:
    blob = home / "hub" / "models--org--llama" / "blobs" / "secret"
    shutil.copy(home.parent / "secret", blob)
    link.symlink_to(f"../../../models--org--llama/blobs/{blob.name}")


def through_a_linked_blob(home: Path, link: Path) -> None:
    (link.parent.parent.parent / "blobs" / "secret").symlink_to(home.parent / "secret")
    link.symlink_to("../../blobs/secret")


def through_linked_blobs(home: Path, link: Path) -> None:
    blobs = link.parent.parent.parent / "blobs"
    shutil.move(blobs, home.parent / "elsewhere")
    shutil.copy(home.parent / "secret", home.parent / "elsewhere" / "secret")
    blobs.symlink_to(home.parent / "elsewhere")
    link.symlink_to("../../blobs/secret")


def out_of_the_blobs(home: Path, link: Path) -> None:
    link.symlink_to("../../blobs/../../../../secret")


@pytest.mark.parametrize(
    "lead", [to_secret, to_another_model, through_a_linked_blob, through_linked_blobs, out_of_the_blobs]
)
@pytest.mark.parametrize(("name", "file"), [("program", "tensors.safetensors"), ("onnx", "model.onnx.data")])
def test_links_that_leave_the_model_are_refused(
    home: Path, name: str, file: str, lead: Callable[[Path, Path], None]
) -> None:
    link = snapshot(home, name) / file
    shutil.copy(link, home.parent / "secret")
    link.unlink()
    lead(home, link)
    assert link.read_bytes() == (home.parent / "secret").read_bytes()
    with pytest.raises(lq.LoopQError, match="is a link") as caught:
        OnnxExecutable(snapshot(home, name)) if name == "onnx" else lq.load(snapshot(home, name))
    assert "\n" not in str(caught.value)


def test_saving_into_a_snapshot_leaves_the_blobs_alone(home: Path) -> None:
    blobs = {path: path.read_bytes() for path in snapshot(home, "program").parents[1].joinpath("blobs").iterdir()}
    tiny_program("w8a8").save(snapshot(home, "program"))
    assert lq.load(snapshot(home, "program")).scheme.name == "w8a8"
    assert {path: path.read_bytes() for path in blobs} == blobs


def test_ids_are_found_in_the_cache_without_a_network(home: Path) -> None:
    script = (
        "import json, socket\n"
        "def refused(*_): raise AssertionError('network')\n"
        "socket.socket.connect = refused\n"
        "from loopq_compile.sources.loading import load_model\n"
        "print(json.dumps({n: load_model(f'org/{n}').kind for n in ('program', 'onnx', 'llama')}))\n"
        "try:\n    load_model('org/none')\n"
        "except Exception as error:\n    print(type(error).__name__, str(error).splitlines()[0])\n"
    )
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE"):
        environment.pop(name, None)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    kinds, error = done.stdout.splitlines()
    assert json.loads(kinds) == {"program": "program", "onnx": "onnx", "llama": "model"}
    assert error.startswith("LoopQError 'org/none' is not a file or folder here")
