"""Saved programs damaged by accident or on purpose, full disks, folders that cannot be written."""

import json
import os
import resource
import shutil
import struct
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import loopq_compile as lq
from loopq_compile.cli import app
from loopq_compile.storage.artifact import save, verify
from loopq_compile.storage.manifest import digest, write_manifest
from tests.cases import cases
from tests.permissions import as_somebody_else

IDS = torch.arange(6).view(2, 3)
FILES = ("program.json", "tensors.safetensors", "manifest.json")


class Little(nn.Module):
    """The smallest looped model that has every kind of content."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layer, self.head = nn.Embedding(16, 32), nn.Linear(32, 32), nn.Linear(32, 16, bias=False)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for _ in range(2):
            x = x + torch.tanh(self.layer(x))
        return self.head(x)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A saved program; tests copy it."""
    folder = tmp_path_factory.mktemp("artifact") / "p"
    program = lq.compile(Little().eval(), IDS, scheme="w4a8", method="las", calibration=[IDS])
    save(program.graph_module, folder, {"tokenizer.json": "{}"})
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "p")


def edit(folder, change, name="program.json", seal=True):
    data = json.loads((folder / name).read_text())
    change(data)
    (folder / name).write_text(json.dumps(data))
    if seal:
        write_manifest(folder)


def edit_tensors(folder, change):
    """Changes tensors as an attacker would: all hashes fit."""
    tensors = load_file(folder / "tensors.safetensors")
    change(tensors)
    save_file(tensors, folder / "tensors.safetensors")
    sealed = digest(folder / "tensors.safetensors")[1]
    edit(folder, lambda data: data.update(sha256=sealed))


def header(folder, length):
    data = bytearray((folder / "tensors.safetensors").read_bytes())
    data[:8] = struct.pack("<Q", length)
    (folder / "tensors.safetensors").write_bytes(data)
    write_manifest(folder)


def rename_in_manifest(name):
    def change(data):
        data["files"][name] = data["files"].pop("tokenizer.json")

    return lambda folder: edit(folder, change, "manifest.json", seal=False)


def replace_by_link(folder):
    outside = folder.parent / "outside.safetensors"
    (folder / "tensors.safetensors").rename(outside)
    (folder / "tensors.safetensors").symlink_to(outside)


def replace_by_pipe(folder):
    os.remove(folder / "tensors.safetensors")
    os.mkfifo(folder / "tensors.safetensors")


def table(tensors):
    return next(name for name in tensors if name.startswith("activation_clip"))


def fill(value):
    return lambda folder: edit_tensors(folder, lambda tensors: tensors[table(tensors)].fill_(value))


def cut_table(tensors):
    tensors[table(tensors)] = tensors[table(tensors)][:1, :].clone()


def outputs(value):
    return lambda folder: edit(folder, lambda data: data["signature"].update(outputs=value))


def unknown_target(data):
    next(n for n in data["nodes"] if n["op"] == "call_function")["target"] = "aten.no_such_thing.default"


def unknown_node(data):
    next(n for n in data["nodes"] if n["op"] == "call_function")["args"][0] = {"node": "nowhere"}


def drop_tag(data):
    next(n for n in data["nodes"] if n.get("tag") and n["target"].startswith("aten.tanh")).pop("tag")


ENUM = {"type": "builtins.list", "context": json.dumps({"__enum__": True, "fqn": "antigravity:x", "name": "y"})}
FACTORY = {"default_factory_module": "antigravity", "default_factory_name": "fly", "dict_context": []}
DAMAGES = {
    "a path in the manifest": (rename_in_manifest("../secret"), "not a plain file name"),
    "an absolute path": (rename_in_manifest("/etc/passwd"), "not a plain file name"),
    "a hidden file": (rename_in_manifest(".profile"), "not a plain file name"),
    "a link to somewhere else": (replace_by_link, "is a link"),
    "a pipe that never ends": (replace_by_pipe, "not a regular file"),
    "a file that is missing": (lambda f: os.remove(f / "tokenizer.json"), "cannot be read"),
    "no manifest": (lambda f: os.remove(f / "manifest.json"), "it has no manifest.json"),
    "a manifest of something else": (
        lambda f: edit(f, lambda d: d.update(format="x"), "manifest.json", False),
        "not the manifest",
    ),
    "a manifest from the future": (
        lambda f: edit(f, lambda d: d.update(version=9, readable_from=9), "manifest.json", False),
        "has format version 9.*Update loopq_compile",
    ),
    "a version that is no number": (lambda f: edit(f, lambda d: d.update(version="2.0")), "not a number"),
    "a cut tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), "has 1 bytes, not 2"),
    "a flipped bit": (lambda f: (f / "tokenizer.json").write_text("[]"), "SHA-256 differs"),
    "a header longer than the file": (lambda f: header(f, 1 << 20), "its header claims 1,048,576 bytes"),
    "a header of many exabytes": (lambda f: header(f, (1 << 63) + 5), "its header claims"),
    "a header that ends too early": (lambda f: header(f, 3), "tensors.safetensors"),
    "a table with NaN": (fill(float("nan")), "activation_clip.* holds NaN"),
    "an infinite table": (fill(float("inf")), "activation_clip.* holds infinite values"),
    "a table of another shape": (lambda f: edit_tensors(f, cut_table), "should be .* and is"),
    "a tensor of another type": (
        lambda f: edit_tensors(f, lambda t: t.update({table(t): t[table(t)].double()})),
        "should be .* and is",
    ),
    "an operator that does not exist": (lambda f: edit(f, unknown_target), "aten.no_such_thing"),
    "a node that does not exist": (lambda f: edit(f, unknown_node), "'nowhere'"),
    "a lost loop tag": (lambda f: edit(f, drop_tag), "had the tag loop="),
    "code to import as an enumeration": (outputs([1, {**ENUM, "children_spec": []}]), "code to import"),
    "code to import as a factory": (
        outputs([1, {"type": "collections.defaultdict", "context": FACTORY, "children_spec": []}]),
        "code to import",
    ),
    "an enormous input": (
        lambda f: edit(f, lambda d: d["signature"]["inputs"][0].__setitem__(2, [1 << 40, 3])),
        "impossible shape",
    ),
    "nesting without end": (lambda f: reseal(f, "[" * 200_000), "cannot be read"),
    "a number without end": (lambda f: reseal(f, "1" * 10_000), "cannot be read"),
    "no object": (lambda f: reseal(f, "[]"), "must hold a JSON object"),
    "bytes that are no text": (lambda f: reseal(f, b"\xff\xfe\x00"), "cannot be read"),
}


def reseal(folder, content):
    (folder / "program.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    write_manifest(folder)


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_damaged_or_hostile_is_refused_with_one_line(name, folder):
    damage, says = DAMAGES[name]
    before = set(sys.modules)
    damage(folder)
    with pytest.raises(lq.LoopQError, match=says) as caught:
        verify(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert "antigravity" not in set(sys.modules) - before


def test_verify_lists_files_and_says_what_it_is(folder):
    (folder / "notes.txt").write_text("mine")
    found = verify(folder)
    assert [record.name for record in found.files] == ["program.json", "tensors.safetensors", "tokenizer.json"]
    assert found.unlisted == ("notes.txt",) and found.version == 2
    assert "2 x (layer); w4a8 dynamic, method las" in found.description


def test_the_command_ends_with_0_or_1(folder):
    runner = CliRunner()
    done = runner.invoke(app, ["verify", str(folder), "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout) == json.loads(json.dumps(asdict(verify(folder))))
    assert "nothing is wrong" in runner.invoke(app, ["verify", str(folder)]).stdout
    (folder / "tokenizer.json").write_text("{")
    done = runner.invoke(app, ["verify", str(folder)])
    assert done.exit_code == 1 and done.stdout == "" and "tokenizer.json does not match" in done.stderr


def test_what_newer_versions_add_is_ignored_if_they_say_it_may_be(folder):
    def extend(data):
        data.update(version=3, readable_from=2, novelty={"x": 1})
        data["scheme"]["novelty"] = data["sites"][0]["novelty"] = data["log"][0]["novelty"] = 1

    expected = lq.load(folder)(IDS)
    edit(folder, extend)
    assert torch.equal(lq.load(folder)(IDS), expected)


def test_programs_of_version_1_are_read(folder):
    def age(data):
        for name in ("readable_from", "tensors"):
            data.pop(name)
        data["version"] = 1

    expected = lq.load(folder)(IDS)
    edit(folder, age)
    (folder / "manifest.json").unlink()
    assert torch.equal(lq.load(folder)(IDS), expected)
    assert verify(folder).version == 1


def test_nan_is_not_saved(original, tmp_path):
    program = lq.load(original)
    program.graph_module.embed.weight.data[0, 0] = float("nan")
    with pytest.raises(lq.LoopQError, match=r"'embed\.weight' holds NaN"):
        program.save(tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


@cases(40)
@given(st.data())
def test_a_changed_byte_is_noticed_or_changes_nothing(original, tmp_path, data):
    folder = tmp_path / "fuzzed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(original, folder)
    path = folder / data.draw(st.sampled_from(FILES))
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        loaded = lq.load(folder)
    except lq.LoopQError:
        return
    assert torch.equal(loaded(IDS), lq.load(original)(IDS))


JUNK = st.sampled_from(
    [None, True, -1, 0, 3, 1 << 70, 0.5, "", "x", "aten.add.Tensor", [], {}, [[]], {"node": "x"}, {"tuple": 3}]
)


def places(value, path=()):
    """Paths to every value in nested lists and dicts."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def change_one(value, path, junk):
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = junk


@cases(60)
@given(st.data())
def test_junk_with_right_hashes_ends_in_an_error_for_users_or_in_a_program(original, tmp_path, data):
    folder = tmp_path / "fuzzed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(original, folder)
    found = list(places(json.loads((original / "program.json").read_text())))
    path = data.draw(st.sampled_from(found))
    junk = data.draw(JUNK)
    edit(folder, lambda content: change_one(content, path, junk))
    try:
        loaded = lq.load(folder)
    except lq.LoopQError as error:
        assert "\n" not in str(error)
        return
    assert isinstance(loaded, lq.Program) and str(loaded)


def test_a_full_disk_leaves_the_older_program(original, tmp_path):
    """A real one: the kernel refuses to write more than 4 KiB into a file."""
    shutil.copytree(original, tmp_path / "p")
    script = (
        "import resource, sys, loopq_compile as lq\n"
        "program = lq.load(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n    program.save(sys.argv[1])\n"
        "except lq.LoopQError as error:\n    print(error)\n"
    )
    assert resource.RLIMIT_FSIZE
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "p"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Cannot write") and "File too large" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["p"]
    assert verify(tmp_path / "p").unlisted == ()


def test_a_folder_without_permission_is_refused_by_name(original, tmp_path):
    program = lq.load(original)
    tmp_path.chmod(0o555)
    with as_somebody_else(), pytest.raises(lq.LoopQError, match=r"Cannot write to .*Permission denied"):
        program.save(tmp_path / "p")
    assert list(tmp_path.iterdir()) == []
