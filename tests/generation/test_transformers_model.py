"""Programs through Hugging Face's `generate`: the same tokens as `Program.generate`, beams, padding, streams."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import loopq_compile as lq
from loopq_compile import bundled
from loopq_compile.capture.to_graph import capture
from loopq_compile.generation.transformers_model import _CACHE
from loopq_compile.models import repeat_layers
from loopq_compile.program import Program
from tests.backends.onnx import graphs
from tests.cli_models import WORDS, tiny_llama, tokenizer
from tests.decoding import ids, left_padded

NEW = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def llama() -> tuple[Any, Program]:
    """A Llama with its first layer run twice, and its full-precision program, captured with a mask."""
    model = repeat_layers(tiny_llama(), 0, 0, 2)
    example = {"input_ids": ids(), "attention_mask": torch.ones_like(ids())}
    return model, Program(capture(model, example))


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"repetition_penalty": 1.5}],
    ids=["greedy", "beams", "several", "penalty"],
)
@pytest.mark.parametrize("use_cache", [True, False])
def test_generates_what_the_model_generates(llama: tuple[Any, Program], options: dict, use_cache: bool) -> None:
    model, program = llama
    expected = model.generate(**left_padded(), **NEW, **options)
    found = program.as_hugging_face().generate(**left_padded(), **NEW, **options, use_cache=use_cache)
    assert torch.equal(found, expected)


def test_samples_what_the_model_samples(llama: tuple[Any, Program]) -> None:
    model, program = llama
    options: dict[str, Any] = {**NEW, "do_sample": True, "top_k": 20, "temperature": 1.3}
    torch.manual_seed(3)
    expected = model.generate(**left_padded(), **options)
    torch.manual_seed(3)
    assert torch.equal(program.as_hugging_face().generate(**left_padded(), **options), expected)


def test_assisted_generation_is_refused(llama: tuple[Any, Program]) -> None:
    """It gave other tokens than plain decoding after proposals that were rejected."""
    hugging_face = llama[1].as_hugging_face()
    config = transformers.GenerationConfig(prompt_lookup_num_tokens=3)
    for options in ({"prompt_lookup_num_tokens": 3}, {"generation_config": config}):
        with pytest.raises(lq.LoopQError, match=r"prompt_lookup_num_tokens.*speculate='lookup'"):
            hugging_face.generate(ids(1, 4), **options)


def test_one_new_token_a_call(llama: tuple[Any, Program], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, ...]] = []
    model = llama[1].as_hugging_face()
    forward = model.forward

    def watched(input_ids: torch.Tensor, **given: Any) -> Any:
        read.append(tuple(input_ids.shape))
        return forward(input_ids, **given)

    monkeypatch.setattr(model, "forward", watched)
    model.generate(**left_padded(), **NEW)
    assert read == [(2, 7), *[(2, 1)] * 5]


def test_a_conversation_goes_on_with_its_cache(llama: tuple[Any, Program]) -> None:
    model = llama[1].as_hugging_face()
    whole = model.generate(**left_padded(), **NEW)
    mask = left_padded()["attention_mask"]
    first = model.generate(**left_padded(), **{**NEW, "max_new_tokens": 3}, return_dict_in_generate=True)
    kept = {_CACHE: first[_CACHE]}
    assert kept[_CACHE].get_seq_length() == 9
    longer = {"attention_mask": torch.cat([mask, torch.ones(2, 3, dtype=torch.int64)], 1)}
    rest = model.generate(first.sequences, **longer, **kept, **{**NEW, "max_new_tokens": 3})
    assert torch.equal(rest, whole)


def test_logits_of_all_tokens_or_the_last(llama: tuple[Any, Program]) -> None:
    model, program = llama
    wrapped = program.as_hugging_face()
    with torch.no_grad():
        expected = model(**left_padded(), use_cache=False).logits
    real = left_padded()["attention_mask"].bool()
    torch.testing.assert_close(wrapped(**left_padded()).logits[real], expected[real], rtol=1e-4, atol=1e-4)
    last = wrapped(**left_padded(), logits_to_keep=1, return_dict=False)[0]
    torch.testing.assert_close(last, expected[:, -1:], rtol=1e-4, atol=1e-4)


def test_a_program_without_a_cache_reads_all_again() -> None:
    program, tokens = Program(graphs.captured(graphs.Recurrent())), graphs.tokens(2, 5)
    wrapped, given = program.as_hugging_face(), {"attention_mask": torch.ones_like(tokens), **NEW}
    assert not wrapped.generation_config.use_cache
    for use_cache in (None, True):
        assert torch.equal(wrapped.generate(tokens, **given, use_cache=use_cache), program.generate(tokens, 6))
    with pytest.raises(lq.LoopQError, match="no attention mask"):
        wrapped.generate(tokens, **{**given, "attention_mask": torch.tensor([[0, 1, 1, 1, 1]] * 2)})


class LastOnly(graphs.Recurrent):
    """Gives the logits of the last token only."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids)[:, -1]


def test_a_model_that_gives_the_last_tokens_logits_only() -> None:
    program = Program(capture(LastOnly(loops=1).eval(), ids(2, 11)))
    given = {"attention_mask": torch.ones(2, 5, dtype=torch.int64), **NEW}
    assert torch.equal(program.as_hugging_face().generate(ids(2, 5), **given), program.generate(ids(2, 5), 6))


def test_the_bundled_model_in_w4a8(tmp_path: Path) -> None:
    """From text to text with a stream, with settings from the program's folder."""
    words = bundled.load_tokenizer()
    program = lq.compile(bundled.load_model(), ids(2, 12), scheme="w4a8", method="symmetric")
    text = torch.tensor([words.encode("Return the").ids])
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 1, "pad_token_id": 1}')
    wrapped = program.as_hugging_face(tmp_path)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
    printed = io.StringIO()
    with redirect_stdout(printed):
        made = wrapped.generate(
            text, max_new_tokens=12, do_sample=False, streamer=transformers.TextStreamer(fast, skip_prompt=True)
        )
    assert torch.equal(made, program.generate(text, 12, eos_token_id=1))
    assert printed.getvalue().strip() == fast.decode(made[0, text.shape[1] :]).strip() != ""


def test_settings_end_the_text(llama: tuple[Any, Program], tmp_path: Path) -> None:
    program = llama[1]
    free = program.generate(ids(1, 7), 6)[0, 7:].tolist()
    transformers.GenerationConfig(eos_token_id=[free[2]], pad_token_id=0).save_pretrained(tmp_path)
    for given in (tmp_path, transformers.GenerationConfig(eos_token_id=free[2], pad_token_id=0)):
        made = program.as_hugging_face(given).generate(ids(1, 7), max_new_tokens=6, do_sample=False)[0, 7:].tolist()
        assert made == free[: free.index(free[2]) + 1]


def test_a_tokenizer_of_transformers(llama: tuple[Any, Program]) -> None:
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(), pad_token=WORDS[0], eos_token=WORDS[0], padding_side="left"
    )
    given = fast(["w1 w2 w3 w4", "w5 w6"], return_tensors="pt", padding=True, return_token_type_ids=False)
    made = llama[1].as_hugging_face().generate(**given, **NEW)
    assert torch.equal(made, llama[0].generate(**given, **NEW))


def test_what_is_refused(llama: tuple[Any, Program], tmp_path: Path) -> None:
    wrapped = llama[1].as_hugging_face()
    with pytest.raises(lq.LoopQError, match="in a DynamicCache; got StaticCache"):
        wrapped.generate(**left_padded(), **NEW, cache_implementation="static")
    with pytest.raises(lq.LoopQError, match=r"There is no generation_config.json in .*leave generation_config out"):
        llama[1].as_hugging_face(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(lq.LoopQError, match="cannot be read"):
        llama[1].as_hugging_face(tmp_path)
    with pytest.raises(lq.LoopQError, match=r"saved by program\.save"):
        wrapped.save_pretrained(tmp_path)
