"""Model cards: every output folder has one that can be uploaded, and nobody's own README is lost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import loopq_compile as lq
from loopq_compile.graph.origin import Origin
from loopq_compile.graph.state import Figure, attach_state, copy_graph, get_state
from loopq_compile.storage.card import card_text, write_card
from loopq_compile.storage.evaluation import add_figures, read_figures
from loopq_compile.storage.manifest import digest
from loopq_compile.storage.recipes import RECIPES
from tests.tiny import tiny_program

BASE = "ByteDance/Ouro-1.4B"


@pytest.fixture(scope="module")
def program() -> lq.Program:
    made = tiny_program("w4a8", method="symmetric")
    copied = copy_graph(made.graph_module)
    attach_state(copied, replace(get_state(made.graph_module), origin=Origin({"_name_or_path": BASE})))
    return lq.Program(copied)


@pytest.mark.parametrize("kind", RECIPES)
def test_the_hub_reads_the_header(kind: str, program: lq.Program) -> None:
    text = card_text(get_state(program.graph_module), kind)
    data = ModelCard(text).data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == (BASE, "quantized")
    assert data["quantization"] == {"scheme": "w4a8", "method": "symmetric"}
    assert data["quantized_by"] == "loopq_compile" and data["library_name"] == RECIPES[kind].library
    assert set(RECIPES[kind].tags) < set(data["tags"])
    assert "4-bit weights in groups of 32, 8-bit activations, dynamic scales" in text
    assert all(engine in text for engine in RECIPES[kind].engines)


def test_a_folder_of_this_machine_is_no_base_model(program: lq.Program, tmp_path: Path) -> None:
    state = replace(get_state(program.graph_module), origin=Origin({"_name_or_path": str(tmp_path)}))
    text = card_text(state, "program")
    assert "base_model" not in text and str(tmp_path) not in text
    assert state.origin.to_dict()["config"]["_name_or_path"] == ""


def test_every_output_has_a_card(program: lq.Program, tmp_path: Path) -> None:
    program.save(tmp_path / "program")
    program.export_onnx(tmp_path / "onnx")
    for name, tag in (("program", "loopq"), ("onnx", "onnx")):
        assert tag in ModelCard.load(tmp_path / name / "README.md").data.tags
    assert lq.load(tmp_path / "program").scheme == program.scheme


def test_own_cards_are_replaced_and_changed_ones_stay(program: lq.Program, tmp_path: Path) -> None:
    card, state = tmp_path / "README.md", get_state(program.graph_module)
    write_card(tmp_path, state, "program")
    write_card(tmp_path, state, "onnx")
    assert "ONNX Runtime" in card.read_text()
    changed = card.read_text().replace("# ", "# My ", 1)
    card.write_text(changed)
    program.save(tmp_path)  # a changed card neither stops a program from being saved nor from being read
    assert card.read_text() == changed
    assert lq.load(tmp_path).scheme == program.scheme
    card.unlink()
    (tmp_path / "Readme.md").write_text("mine")
    write_card(tmp_path, state, "program")
    assert (tmp_path / "Readme.md").read_text() == "mine" and "README.md" not in {p.name for p in tmp_path.iterdir()}


def test_figures_of_this_very_program_are_in_the_cards_of_all_that_is_made_of_it(tmp_path: Path) -> None:
    made = tiny_program("w4a8", method="symmetric")
    made.save(tmp_path / "a")
    assert "Not measured" in (tmp_path / "a/README.md").read_text()
    first = Figure("a text", "perplexity", "64 tokens", 9.0)
    add_figures(tmp_path / "a", [first])
    add_figures(
        tmp_path / "a", [replace(first, value=8.5), Figure("a text", "KL divergence from x", "64 tokens", 0.25)]
    )
    loaded = lq.load(tmp_path / "a")
    loaded.save(tmp_path / "b")
    loaded.export_onnx(tmp_path / "onnx")
    for folder in ("b", "onnx"):
        card = ModelCard.load(tmp_path / folder / "README.md")
        assert "| a text | perplexity | 8.5 | 64 tokens |" in card.text
        assert {result.metric_value for result in card.data.eval_results} == {8.5, 0.25}
    assert len(read_figures(tmp_path / "b")) == 2
    changed = lq.load(tmp_path / "a").with_cache()
    assert not get_state(changed.graph_module).figures, "another program"
    tiny_program("w8a8", method="symmetric").save(tmp_path / "c")
    (tmp_path / "c/evaluation.json").write_bytes((tmp_path / "a/evaluation.json").read_bytes())
    assert read_figures(tmp_path / "a") and not read_figures(tmp_path / "c")


@pytest.mark.parametrize("content", ["", "[]", '{"program": 1}', '{"program": "PROGRAM", "figures": [{"value": "x"}]}'])
def test_damaged_figures_are_none(content: str, program: lq.Program, tmp_path: Path) -> None:
    program.save(tmp_path)
    (tmp_path / "evaluation.json").write_text(content.replace("PROGRAM", digest(tmp_path / "program.json")[1]))
    assert read_figures(tmp_path) == [] and lq.load(tmp_path).scheme == program.scheme
