"""Tokens, special tokens and the way text is split."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gguf import GGUFWriter, TokenType

import loopq_compile as lq
from loopq_compile.backends.gguf.vocabulary import add_tokenizer
from tests.backends.gguf.files import field, save_tokenizer


def written(folder: Path, vocabulary: int = 300, pre_tokenizer: str | None = None) -> Path:
    file = folder / "v.gguf"
    writer = GGUFWriter(file, "llama")
    add_tokenizer(writer, folder, vocabulary, pre_tokenizer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return file


def test_tokens_special_tokens_and_padding(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path)
    file = written(tmp_path, 310)
    tokens, kinds = field(file, "tokenizer.ggml.tokens"), field(file, "tokenizer.ggml.token_type")
    size = tokenizer.get_vocab_size()
    assert tokens[:size] == [tokenizer.id_to_token(number) for number in range(size)]
    assert tokens[309] == "[PAD309]" and kinds[309] == TokenType.UNUSED
    end = tokenizer.token_to_id("<|endoftext|>")
    assert kinds[end] == TokenType.CONTROL and field(file, "tokenizer.ggml.eos_token_id") == end
    assert field(file, "tokenizer.ggml.model") == "gpt2"
    merges = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    assert field(file, "tokenizer.ggml.merges") == [" ".join(pair) for pair in merges]


@pytest.mark.parametrize(("digits", "name"), [(False, "gpt-2"), (True, "smollm")])
def test_how_text_is_split(digits: bool, name: str, tmp_path: Path) -> None:
    save_tokenizer(tmp_path, digits)
    assert field(written(tmp_path), "tokenizer.ggml.pre") == name


def test_unknown_splits_need_a_name(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["pre_tokenizer"]["add_prefix_space"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(lq.LoopQError, match="pre_tokenizer='gpt-2'"):
        written(tmp_path)
    assert field(written(tmp_path, pre_tokenizer="olmo"), "tokenizer.ggml.pre") == "olmo"


def test_tokenizers_of_other_models(tmp_path: Path) -> None:
    with pytest.raises(lq.LoopQError, match=r"no tokenizer\.json"):
        written(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(lq.LoopQError, match="tokens, the model 100"):
        written(tmp_path, 100)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(lq.LoopQError, match="none that llama"):
        written(tmp_path)
