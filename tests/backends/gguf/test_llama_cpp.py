"""llama.cpp itself on exported files. By hand: `pip install llama-cpp-python`, which compiles for some minutes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import loopq_compile as lq
from tests.backends.gguf.files import compiled, hrm, looped_llama, nanbeige, save_tokenizer, tokens, unpacked

llama_cpp = pytest.importorskip(
    "llama_cpp", reason="run by hand, since llama-cpp-python is built from source: pip install llama-cpp-python"
)
pytestmark = pytest.mark.nightly
"""The engine ends the whole process with a segmentation fault where its AMX kernels were compiled wrongly (GCC 12)."""
_F32 = 0


@contextmanager
def opened(path: Path, **options: Any) -> Iterator[Any]:
    """llama.cpp on one thread, with a cache in float32."""
    options = {"n_ctx": 64, "n_threads": 1, "verbose": False, "type_k": _F32, "type_v": _F32, **options}
    model = llama_cpp.Llama(str(path), **options)
    yield model
    model.close()


def engine_logits(path: Path, ids: Tensor) -> Tensor:
    """Logits `[sequence, vocabulary]` of one row of ids."""
    with opened(path, logits_all=True) as model:
        model.eval(ids[0].tolist())
        return torch.from_numpy(np.array(model.scores[: ids.shape[1]])).float()


def program_logits(program: lq.Program, ids: Tensor) -> Tensor:
    result = program(ids)
    return (result if isinstance(result, Tensor) else result["logits"])[0]


def difference(one: Tensor, other: Tensor) -> float:
    """Relative, in the Euclidean norm."""
    return float((one - other).norm() / other.norm())


def made(kind: str, scheme: str) -> tuple[Any, lq.Program]:
    if kind == "Nanbeige":
        return nanbeige(scheme)
    if kind == "HrmText":
        model, program = hrm(scheme)
        return model.config, program
    model, program = compiled(kind, scheme)
    return model.config, program


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3", "Nanbeige", "HrmText"])
def test_logits_are_those_of_the_program(kind: str, tmp_path: Path) -> None:
    """Equal where llama.cpp rounds nothing; with rounded activations, as far away as rounding them moves logits."""
    ids, floats = tokens(), {"embeddings": "f32", "head": "f32"}
    config, plain = made(kind, "w4a16")
    plain.export_gguf(tmp_path / "plain.gguf", config=config, **floats)
    exact = engine_logits(unpacked(tmp_path / "plain.gguf", tmp_path / "unpacked.gguf"), ids)
    assert difference(exact, program_logits(plain, ids)) < 1e-5
    config, rounded = made(kind, "w4a8")
    rounded.export_gguf(tmp_path / "rounded.gguf", config=config, **floats)
    found, wanted = engine_logits(tmp_path / "rounded.gguf", ids), program_logits(rounded, ids)
    noise = difference(wanted, program_logits(plain, ids))
    print(f"{kind}: {difference(found, wanted):.4f} from the program; rounding activations moves it by {noise:.4f}")
    assert difference(found, wanted) < 1.3 * noise < 0.05


def trained(ids: list[int]) -> Any:
    """A tiny looped model that knows one text by heart, so that no two tokens are equally likely."""
    model = looped_llama(vocab_size=300)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        row = torch.tensor([ids])
        model(row, labels=row).loss.backward()
        optimizer.step()
    return model


def test_the_same_greedy_text(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path)
    text, prompt = "the loop runs the block again and again, 3 times in a row<|endoftext|>", "the loop runs"
    ids = tokenizer.encode(prompt).ids
    model = trained(tokenizer.encode(text).ids)
    model.config.save_pretrained(tmp_path)
    data = [torch.tensor([tokenizer.encode(text).ids] * 2)] * 2
    program = lq.compile(model, scheme="w4a8", method="loopq-plain", calibration=data, steps=4)
    assert program.export_gguf(tmp_path / "m.gguf", tokenizer=tmp_path).scale_change == 0
    wanted = program.generate(torch.tensor([ids]), 40, eos_token_id=tokenizer.token_to_id("<|endoftext|>"))
    with opened(tmp_path / "m.gguf") as engine:
        assert engine.tokenize(prompt.encode(), add_bos=False, special=False) == ids
        found = engine.create_completion(prompt, max_tokens=40, temperature=0.0)["choices"][0]["text"]
    assert prompt + found == tokenizer.decode(wanted[0].tolist()) == text.removesuffix("<|endoftext|>")
