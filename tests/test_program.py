"""Programs: calling, printing, summary, saving and loading."""

import ast
import json
import operator
import os
import shutil

import pytest
import torch

import loopq_compile as lq
from loopq_compile.graph.printer import print_transition
from loopq_compile.operators import ops
from loopq_compile.storage.manifest import write_manifest
from tests.tiny import tiny_model, tiny_program, tokens


def test_a_program_is_called_like_the_model():
    program, model = tiny_program("w8a8"), tiny_model()
    for batch, length in ((1, 1), (3, 7), (2, 33)):
        ids = tokens(4, batch, length)
        expected, got = model(ids), program(input_ids=ids)
        assert set(got) == set(expected)
        assert got["logits"].shape == expected["logits"].shape
        assert (got["logits"] - expected["logits"]).norm() < 0.05 * expected["logits"].norm()


def test_the_model_is_left_as_it_was():
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lq.compile(model, tokens(), scheme="w4a4", method="symmetric")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_printed_program_is_python_that_gives_the_same_result():
    program = tiny_program()
    text = str(program)
    ast.parse(text)
    scope = {"torch": torch, "inf": float("inf"), "operator": operator}
    exec(text, scope)
    with torch.no_grad():
        flat = scope["forward"](program.graph_module, tokens(8))
    assert torch.equal(flat[0], program(tokens(8))["logits"])


def test_printing_is_stable_and_names_loops_sites_types_and_passes():
    data = [tokens(seed) for seed in range(3)]
    again = lq.compile(tiny_model(), tokens(), scheme="w4a4", method="las", calibration=data)
    text = str(tiny_program())
    assert str(again) == text
    assert all(f"loop={t}" in text for t in range(3)) and "loop=3" not in text
    line = next(line for line in text.splitlines() if "ops.loopq.quantize" in line and "loop=1" in line)
    assert "site=layers.0.attn.q_proj+k_proj+v_proj" in line
    assert "i4[batch, sequence, 64]" in line and "by insert-activation-qdq" in line


def test_the_transition_shows_both_sides():
    text = print_transition(tiny_program().graph_module, boundary=1)
    assert "---- loop=2" in text and "loop=1 site=norm" in text


def test_the_summary_has_a_row_per_linear_and_a_column_per_loop():
    text = tiny_program("w4a4", "las", "static").summary()
    row = next(line for line in text.splitlines() if line.startswith("layers.0.down"))
    assert "w4" in row and "8,192" in row
    assert len([float(cell) for cell in row.split("8,192")[1].split()]) == 3
    assert "range 2" in text and "a language-model head" in text


@pytest.mark.parametrize("scheme", ["w4a4", "w3a3", "w8a8", "w4a16"])
def test_saving_and_loading_keeps_every_bit(scheme, tmp_path):
    program = tiny_program(scheme)
    program.save(tmp_path / "p")
    loaded = lq.load(tmp_path / "p")
    assert torch.equal(loaded(tokens(9))["logits"], program(tokens(9))["logits"])
    assert str(loaded) == str(program) and loaded.summary() == program.summary()
    assert loaded.loops == program.loops and loaded.scheme == program.scheme
    assert {path.suffix for path in (tmp_path / "p").iterdir()} == {".json", ".md", ".safetensors"}


def test_four_bit_weights_take_half_a_byte_on_disk(tmp_path):
    for scheme in ("w4a16", "w8a16"):
        tiny_program(scheme).save(tmp_path / scheme)
    four, eight = ((tmp_path / s / "tensors.safetensors").stat().st_size for s in ("w4a16", "w8a16"))
    weights = sum(p.numel() for name, p in tiny_model().layers.named_parameters() if p.ndim == 2)
    assert eight - four == pytest.approx(weights / 2, abs=200)


def test_saving_replaces_an_older_program_and_nothing_else(tmp_path):
    tiny_program().save(tmp_path / "p")
    (tmp_path / "p" / "photos").mkdir()
    (tmp_path / "p" / "photos" / "me.jpg").write_text("x")
    tiny_program("w8a8").save(tmp_path / "p")
    assert lq.load(tmp_path / "p").scheme.name == "w8a8"
    assert (tmp_path / "p" / "photos" / "me.jpg").read_text() == "x"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "program.json").write_text("{}")
    with pytest.raises(lq.LoopQError, match=r"program.json is there already"):
        tiny_program().save(tmp_path / "other")
    assert (tmp_path / "other" / "program.json").read_text() == "{}"


def test_a_failed_save_leaves_nothing_behind(tmp_path, monkeypatch):
    import loopq_compile.storage.artifact as artifact

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifact, "save_file", full)
    with pytest.raises(lq.LoopQError, match="No space left on device"):
        tiny_program().save(tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


def damage_cut(folder):
    data = (folder / "tensors.safetensors").read_bytes()
    (folder / "tensors.safetensors").write_bytes(data[:-100])


def damage_json(folder):
    (folder / "program.json").write_text("{ nonsense")


def edit(folder, change):
    data = json.loads((folder / "program.json").read_text())
    change(data)
    (folder / "program.json").write_text(json.dumps(data))
    write_manifest(folder)  # as an attacker would


def set_operator(data):
    next(n for n in data["nodes"] if n["op"] == "call_function")["target"] = "os.system"


def set_file_reader(data):
    next(n for n in data["nodes"] if n["op"] == "call_function")["target"] = "aten.from_file.default"


def drop_tensor(data):
    next(n for n in data["nodes"] if n["op"] == "get_attr")["target"] = "elsewhere"


DAMAGES = {
    "truncated tensors": (damage_cut, "changed or cut off"),
    "broken json": (damage_json, "does not match manifest.json"),
    "no tensors": (lambda folder: os.remove(folder / "tensors.safetensors"), "cannot be read"),
    "no program": (lambda folder: os.remove(folder / "program.json"), "not a saved program"),
    "another format": (lambda folder: edit(folder, lambda d: d.update(format="x")), "not a loopq_compile program"),
    "a newer version": (lambda f: edit(f, lambda d: d.update(version=99, readable_from=99)), "Update loopq_compile"),
    "a function of Python": (lambda folder: edit(folder, set_operator), "os.system"),
    "an operator that reads files": (lambda folder: edit(folder, set_file_reader), "from_file"),
    "a missing tensor": (lambda folder: edit(folder, drop_tensor), "'elsewhere' is missing"),
    "a missing field": (lambda folder: edit(folder, lambda d: d.pop("loops")), "damaged"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_folders_are_refused_with_one_message(name, tmp_path):
    damage, says = DAMAGES[name]
    tiny_program().save(tmp_path / "p")
    damage(tmp_path / "p")
    with pytest.raises(lq.LoopQError, match=says):
        lq.load(tmp_path / "p")
    shutil.rmtree(tmp_path / "p")


def test_generation_equals_greedy_recomputation():
    program, ids = tiny_program(), tokens(3, 2, 5)
    got = program.generate(ids, max_new_tokens=6)
    for _ in range(6):
        ids = torch.cat([ids, program(ids)["logits"][:, -1:].argmax(-1)], 1)
    assert torch.equal(got, ids)


def test_every_inserted_node_inside_a_loop_is_tagged():
    graph = tiny_program().graph_module.graph
    inserted = [n for n in graph.nodes if n.target in (ops.dynamic_scale.default,)]
    assert len(inserted) == 12 and all("loopq_loop" in node.meta for node in inserted)
