"""Saved programs through transformers' own `from_pretrained`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

import loopq_compile as lq
from tests.backends.gguf.files import looped_llama, save_tokenizer, tokens


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[lq.Program, Path]]:
    folder = tmp_path_factory.mktemp("program")
    program = lq.compile(looped_llama(), scheme="w4a8", method="symmetric")
    program.save(folder)
    save_tokenizer(folder)
    lq.register_with_transformers()
    lq.register_with_transformers()
    yield program, folder


def test_a_saved_program_is_a_model_of_transformers(saved: tuple[lq.Program, Path]) -> None:
    program, folder = saved
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", device_map={"": "cpu"}, subfolder=""
    )
    with torch.no_grad():
        assert torch.equal(model(tokens(2)).logits, program(tokens(2)).logits)
    wanted = program.generate(tokens(1, 8), max_new_tokens=5)
    assert torch.equal(model.generate(tokens(1, 8), max_new_tokens=5, eos_token_id=None), wanted)
    assert model.config.max_position_embeddings == 256
    assert transformers.AutoConfig.from_pretrained(folder).vocab_size == 128


def test_options_that_would_change_it_are_refused(saved: tuple[lq.Program, Path]) -> None:
    load = transformers.AutoModelForCausalLM.from_pretrained
    for options, words in (
        ({"dtype": torch.float16}, "computes in torch.float32"),
        ({"offload_folder": "x"}, "takes no 'offload_folder'"),
        ({"device_map": {"a": "cpu", "b": "cuda"}}, "lies on one device"),
    ):
        with pytest.raises(lq.LoopQError, match=words):
            load(saved[1], **options)


def test_its_tokenizer_loads_without_this_package(saved: tuple[lq.Program, Path]) -> None:
    code = "import sys, transformers; print(transformers.AutoTokenizer.from_pretrained(sys.argv[1])('the loop'))"
    found = subprocess.run([sys.executable, "-c", code, str(saved[1])], capture_output=True, text=True)
    assert "input_ids" in found.stdout, found.stderr


def test_a_config_of_ones_own_stays(saved: tuple[lq.Program, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    saved[0].save(tmp_path)
    assert (tmp_path / "config.json").read_text() == "{}"
