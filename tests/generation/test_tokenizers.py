"""Properties of tokenizers: stored limits do not apply, and texts are those of their tokens."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import loopq_compile as lq
from loopq_compile.cli.generate import pieces
from loopq_compile.generation.tokenizer import tokenize, without_limits
from loopq_compile.sources.loading import load_model, save_beside
from tests.cli_models import TEXT, tiny_ouro, tokenizer


def limited() -> Tokenizer:
    made = tokenizer()
    made.enable_truncation(8)
    made.enable_padding(length=64)
    return made


@pytest.mark.parametrize("text", ["w1 w2 w3", TEXT])
def test_stored_truncation_and_padding_do_not_apply(text: str) -> None:
    given = limited()
    before = given.to_str()
    assert tokenize(given, text).tolist() == tokenizer().encode(text).ids
    assert given.to_str() == before, "the user's object stays as it is"
    assert without_limits(tokenizer()).truncation is None and without_limits(None) is None


def test_the_users_file_travels_byte_by_byte(tmp_path: Path) -> None:
    source = tmp_path / "tokenizer.json"
    source.write_text(limited().to_str(pretty=False) + "\r\n")
    program = lq.compile(tiny_ouro(), torch.ones(2, 8, dtype=torch.int64), scheme="w8a8", method="symmetric")
    program.save(tmp_path / "program")
    (tmp_path / "program" / "tokenizer.json").write_bytes(source.read_bytes())
    loaded = load_model(tmp_path / "program")
    program.export_onnx(tmp_path / "onnx")
    save_beside(loaded, tmp_path / "onnx")
    assert (tmp_path / "onnx" / "tokenizer.json").read_bytes() == source.read_bytes()
    other = loaded.with_tokenizer(source)
    assert other.files()["tokenizer.json"].encode() == source.read_bytes()
    assert tokenize(other.tokenizer, TEXT).tolist() == tokenizer().encode(TEXT).ids


def metaspace() -> Tokenizer:
    """Words begin with a mark that decoders turn into a space, except at the beginning of a text."""
    words = ["<unk>", "▁a", "▁b", "c", *(f"<0x{byte:02X}>" for byte in "猫".encode())]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


def test_pieces_joined_are_the_text_after_the_prompt() -> None:
    made: list[int] = []
    new = [2, 3, 4, 5, 6, 1]
    found = list(pieces(metaspace(), [1], iter(new), made))
    assert found == [" b", "c", "猫", " a"], "half a character waits; a first space stays"
    assert "".join(found) == metaspace().decode([1, *new])[len(metaspace().decode([1])) :]


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
def test_terminals_that_cannot_hold_a_character(encoding: str, tmp_path: Path) -> None:

    code = (
        "import typer; from loopq_compile.cli.common import Commands\n"
        "app = typer.Typer(cls=Commands)\n"
        "@app.command()\ndef show(): typer.echo('a 猫 \\udcff')\n"
        "@app.command()\ndef other(): pass\n"
        "app(['show'])"
    )

    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (0, b"a \\u732b \\udcff\n"), done.stderr


def test_generate_refuses_what_is_out_of_range() -> None:
    from typer.testing import CliRunner

    from loopq_compile.cli import app

    cases: list[tuple[list[Any], str]] = [
        (["--seed", "99999999999999999999"], "--seed must be at most"),
        (["--prompt", "a\udcff"], "--prompt is not UTF-8 text: character 1 is byte 0xff"),
    ]
    for options, message in cases:
        result = CliRunner().invoke(app, ["generate", "bundled", "--prompt", "x", *options])
        assert result.exit_code == 1 and message in " ".join(result.output.split())
