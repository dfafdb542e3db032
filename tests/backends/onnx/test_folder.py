"""Exported folders: a manifest proves that they are intact; hostile ones are refused in one line."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnx.external_data_helper import set_external_data
from typer.testing import CliRunner

from loopq_compile.backends.onnx import OnnxExecutable, export
from loopq_compile.backends.onnx.folder import KIND, verify
from loopq_compile.cli import app
from loopq_compile.errors import LoopQError
from loopq_compile.storage.manifest import write_manifest
from tests.tiny import tiny_program, tokens


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with its weights in a separate file."""
    folder = tmp_path_factory.mktemp("good") / "onnx"
    export(tiny_program("w4a8", "symmetric").graph_module, folder, external_data_threshold=100)
    assert (folder / "model.onnx.data").is_file()
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good, tmp_path / "onnx")


def refused(folder: Path, *, opens: bool = False) -> str:
    """The one line with which `verify` refuses a folder; `OnnxExecutable` refuses it too, unless it `opens`."""
    done = CliRunner().invoke(app, ["verify", str(folder)])
    assert done.exit_code == 1, done.output
    message = done.stderr.strip()
    assert message.startswith("error: ") and "\n" not in message
    if not opens:
        with pytest.raises(LoopQError) as caught:
            OnnxExecutable(folder)
        assert "\n" not in str(caught.value)
    return message


def change(folder: Path, edit) -> None:
    """Edits the model as an attacker would, who can also write a fitting manifest."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    edit(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    write_manifest(folder, KIND, [file.name for file in folder.iterdir() if file.name != KIND.file and file.is_file()])


def weight(model: onnx.ModelProto) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.external_data)


def move(tensor: onnx.TensorProto, location: str) -> None:
    """Declares that a tensor's numbers are in another file."""
    next(entry for entry in tensor.external_data if entry.key == "location").value = location


def test_a_whole_folder_is_described_and_runs(good: Path) -> None:
    found = verify(good)
    assert {file.name for file in found.files} == {"model.onnx", "model.onnx.data"} and not found.unlisted
    assert found.nodes > 100 and json.loads(found.description)["loops"] == 3
    versions = json.loads((good / KIND.file).read_text())
    assert set(versions["versions"]) == {"torch", "onnx", "onnxruntime"} and versions["loopq_compile"]
    logits = OnnxExecutable(good)(tokens())["logits"]
    torch.testing.assert_close(logits, tiny_program("w4a8", "symmetric")(tokens())["logits"], rtol=0.05, atol=0.5)
    assert CliRunner().invoke(app, ["verify", str(good / "model.onnx")]).exit_code == 0


def test_the_command_lists_tokenizer_and_settings_too(tmp_path: Path) -> None:
    tiny_program("w4a8", "symmetric").save(tmp_path / "p")
    (tmp_path / "p" / "generation_config.json").write_text('{"eos_token_id": 3}')
    for options in (["--form", "rolled"], ["--genai"]):
        done = CliRunner().invoke(app, ["export", str(tmp_path / "p"), "--out", str(tmp_path / "o"), *options])
        assert done.exit_code == 0, done.output
    done = CliRunner().invoke(app, ["verify", str(tmp_path / "o"), "--json"])
    names = [file["name"] for file in json.loads(done.stdout)["files"]]
    assert names == ["genai_config.json", "generation_config.json", "model.onnx"]


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "..", "", "C:\\secret", ".hidden"])
def test_weights_outside_the_folder_are_refused(folder: Path, name: str) -> None:
    (folder.parent / "secret").write_bytes(bytes(1 << 20))

    change(folder, lambda model: move(weight(model), name))
    assert "is not a plain file name" in refused(folder)


@pytest.mark.parametrize("place", ["attribute", "inner graph", "inner node", "sparse"])
def test_they_are_found_wherever_a_model_can_hold_them(folder: Path, place: str) -> None:
    hidden = numpy_helper.from_array(np.zeros(4, np.float32), "hidden")
    set_external_data(hidden, "../secret", offset=0, length=16)
    hidden.ClearField("raw_data")
    hidden.data_location = onnx.TensorProto.EXTERNAL
    constant = onnx.helper.make_node("Constant", [], ["y"], value=numpy_helper.from_array(np.zeros(4, np.float32)))
    constant.attribute[0].t.CopyFrom(hidden)
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [4])
    inner = onnx.helper.make_graph([constant] if place == "inner node" else [], "inner", [], [y])
    if place == "inner graph":
        inner.initializer.append(hidden)

    def hide(model: onnx.ModelProto) -> None:
        if place == "attribute":
            model.graph.node.append(constant)
        elif place == "sparse":
            model.graph.sparse_initializer.add().values.CopyFrom(hidden)
        else:
            branches = {"then_branch": inner, "else_branch": inner}
            model.graph.node.append(onnx.helper.make_node("If", ["input_ids"], ["z"], **branches))

    change(folder, hide)
    assert "is not a plain file name" in refused(folder)


def test_data_that_is_a_link_is_refused(folder: Path) -> None:
    data = folder / "model.onnx.data"
    data.rename(folder.parent / "elsewhere")
    data.symlink_to(folder.parent / "elsewhere")
    assert "is a link" in refused(folder)


def test_a_model_that_is_a_link_opens_and_a_pipe_does_not(tmp_path: Path) -> None:
    tiny_program("w4a8", "symmetric").export_onnx(tmp_path / "blobs")
    (tmp_path / "model.onnx").symlink_to(tmp_path / "blobs" / "model.onnx")
    assert OnnxExecutable(tmp_path / "model.onnx").program_info["loops"] == 3
    os.mkfifo(tmp_path / "pipe.onnx")
    with pytest.raises(LoopQError, match="is not a file"):
        OnnxExecutable(tmp_path / "pipe.onnx")


@pytest.mark.parametrize("file", ["model.onnx", "model.onnx.data"])
def test_files_that_are_cut_off_are_refused(folder: Path, file: str) -> None:
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: len(content) - 100])
    assert "changed or cut off" in refused(folder)
    write_manifest(folder, KIND, ["model.onnx", "model.onnx.data"])
    assert "is cut off" in refused(folder) if file.endswith("data") else "is damaged" in refused(folder)
    (folder / file).write_bytes(b"")
    write_manifest(folder, KIND, ["model.onnx", "model.onnx.data"])
    refused(folder)


def test_one_bit_is_enough(folder: Path) -> None:
    content = bytearray((folder / "model.onnx.data").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "model.onnx.data").write_bytes(content)
    assert "its SHA-256 differs" in refused(folder, opens=True)


def test_missing_files_are_named(folder: Path) -> None:
    (folder / "model.onnx.data").unlink()
    assert "model.onnx.data cannot be read" in refused(folder)
    (folder / KIND.file).unlink()
    assert f"has no {KIND.file}" in refused(folder)


@pytest.mark.parametrize("numbers", [{"offset": "-5"}, {"length": "1" + "0" * 30}, {"offset": "five"}])
def test_offsets_outside_the_file_are_refused(folder: Path, numbers: dict[str, str]) -> None:
    def misplace(model: onnx.ModelProto) -> None:
        for entry in weight(model).external_data:
            entry.value = numbers.get(entry.key, entry.value)

    change(folder, misplace)
    message = refused(folder)
    assert "is cut off" in message or "is damaged" in message


def test_weights_in_a_file_that_the_manifest_does_not_list_are_refused(folder: Path) -> None:
    shutil.copy(folder / "model.onnx.data", folder / "other.data")
    change(folder, lambda model: move(weight(model), "other.data"))
    write_manifest(folder, KIND, ["model.onnx", "model.onnx.data"])
    assert "does not list 'other.data'" in refused(folder, opens=True)


def test_nan_and_wrong_sizes_are_refused(tmp_path: Path) -> None:
    tiny_program("w4a8", "symmetric").export_onnx(tmp_path / "nan")
    shutil.copytree(tmp_path / "nan", tmp_path / "size")

    def floats(model: onnx.ModelProto) -> onnx.TensorProto:
        return next(t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and t.dims[:1] != [1])

    def poison(model: onnx.ModelProto) -> None:
        tensor = floats(model)
        values = numpy_helper.to_array(tensor).copy()
        values.flat[0] = np.nan
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    change(tmp_path / "nan", poison)
    assert "holds NaN" in refused(tmp_path / "nan", opens=True)
    change(tmp_path / "size", lambda model: floats(model).dims.append(7))
    assert "is damaged: tensor" in refused(tmp_path / "size")


def test_a_manifest_of_a_newer_version_or_with_paths_is_refused(folder: Path) -> None:
    manifest = json.loads((folder / KIND.file).read_text())
    (folder / KIND.file).write_text(json.dumps(manifest | {"version": 9, "readable_from": 9}))
    assert "Update loopq_compile" in refused(folder, opens=True)
    files = manifest["files"] | {"../model.onnx": manifest["files"]["model.onnx"]}
    (folder / KIND.file).write_text(json.dumps(manifest | {"files": files}))
    assert "is not a plain file name" in refused(folder, opens=True)


def test_a_folder_with_program_and_export_is_verified_whole(tmp_path: Path) -> None:
    program = tiny_program("w4a8", "symmetric")
    program.save(tmp_path / "both")
    program.export_onnx(tmp_path / "both")
    done = CliRunner().invoke(app, ["verify", str(tmp_path / "both"), "--json"])
    assert done.exit_code == 0 and len(json.loads(done.stdout)) == 2
    (tmp_path / "both" / "model.onnx").write_bytes(b"x")
    assert "changed or cut off" in refused(tmp_path / "both")
