"""Exported folders in onnxruntime-genai: the same greedy tokens as `OnnxExecutable.generate`."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from torch import Tensor

import loopq_compile as lq
from loopq_compile import bundled
from loopq_compile.backends.onnx import OnnxExecutable, export, write_genai_config
from loopq_compile.backends.onnx.genai_tokenizer import notes_for, with_special_tokens
from loopq_compile.sources.loading import Loaded, save_beside
from tests.decoding import captured, ids, quantized


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with two of its loops, and its tokenizer."""
    path = tmp_path_factory.mktemp("genai")
    model = bundled.load_model()
    model.loops = 2
    program = lq.compile(model, ids(), scheme="w4a8", method="symmetric")
    program.export_onnx(path, target="onnxruntime", cache=True, last_token=True)
    save_beside(Loaded(None, bundled.load_tokenizer()), path)
    write_genai_config(path, eos_token_id=0)
    return path


def generated(folder: Path, prompts: Tensor, new: int, **options: Any) -> list[list[int]]:
    """The output of onnxruntime-genai for `prompts` `[batch, sequence]`, prompts included."""
    genai = pytest.importorskip("onnxruntime_genai", reason="needs the extra `genai`")
    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(batch_size=len(prompts), max_length=prompts.shape[1] + new, **options)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(prompts.numpy().astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [generator.get_sequence(row).tolist() for row in range(len(prompts))]


def test_the_bundled_model(folder: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="needs the extra `genai`")
    reader = genai.Tokenizer(genai.Model(str(folder)))
    tokenizer = bundled.load_tokenizer()
    for text in ("Return the", 'def f(x):\n    """Grüße,  日本語 — don\'t."""\n\n', "  1234\t\r\n", "<|endoftext|> x"):
        assert reader.encode(text).tolist() == tokenizer.encode(text).ids
        assert reader.decode(reader.encode(text)) == tokenizer.decode(tokenizer.encode(text).ids)
    prompt = torch.tensor([tokenizer.encode("Return the number of").ids])
    expected = OnnxExecutable(folder).generate(prompt, 24)
    assert generated(folder, prompt, 24) == expected.tolist()
    assert len(set(expected[0].tolist())) > 8  # not a single token repeated


def test_two_prompts_in_standard_operators(tmp_path: Path) -> None:
    export(quantized().graph_module, tmp_path, target="qdq", cache=True)
    write_genai_config(tmp_path, eos_token_id=63)
    expected = OnnxExecutable(tmp_path).generate(ids(2, 6), 12)
    assert generated(tmp_path, ids(2, 6), 12) == expected.tolist()


def test_a_file_of_two_forms(tmp_path: Path) -> None:
    """Prompts in integer products, single tokens in packed ones."""
    export(quantized().graph_module, tmp_path, target="onnxruntime", cache=True, products="both")
    write_genai_config(tmp_path, eos_token_id=63)
    expected = OnnxExecutable(tmp_path).generate(ids(2, 6), 12)
    assert generated(tmp_path, ids(2, 6), 12) == expected.tolist()


def test_a_llama_ends_at_each_of_the_end_tokens(tmp_path: Path) -> None:
    export(captured("llama")[1].graph_module, tmp_path, target="onnxruntime", cache=True)
    run, prompt = OnnxExecutable(tmp_path), ids(1, 5)
    free = run.generate(prompt, 12)[0].tolist()
    ends = [next(token for token in range(64) if token not in free), free[9]]
    write_genai_config(tmp_path, eos_token_id=ends)
    *expected, end = run.generate(prompt, 12, eos_token_id=ends)[0].tolist()
    assert end in ends and len(expected) < len(free)
    assert generated(tmp_path, prompt, 12) == [expected]  # that runtime leaves the end token out


def test_what_the_configuration_says(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "genai_config.json").read_text())
    decoder = config["model"]["decoder"]
    assert decoder["num_hidden_layers"] == 2 * 3, "every layer has a cache for every loop"
    assert (decoder["num_key_value_heads"], decoder["head_size"], config["model"]["vocab_size"]) == (4, 64, 2048)
    assert decoder["inputs"]["past_key_names"] == "past_key_values.%d.key"
    for name in ("model.onnx", "tokenizer.json"):
        shutil.copy(folder / name, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    write_genai_config(tmp_path, eos_token_id=5, pad_token_id=7, context_length=99)
    model = json.loads((tmp_path / "genai_config.json").read_text())["model"]
    assert (model["eos_token_id"], model["pad_token_id"], model["context_length"]) == (5, 7, 99)
    assert (tmp_path / "tokenizer_config.json").read_text() == "{}", "the model's own stays"


def stub(folder: Path, **inputs: tuple[int, list[int | str]]) -> None:
    """A file with these inputs (type and shape) and logits of 64 tokens, which does not run."""
    values = [onnx.helper.make_tensor_value_info(name, *kind) for name, kind in inputs.items()]
    logits = onnx.helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", 64])
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "stub", values, [logits])), folder / "model.onnx")


def test_what_is_refused(tmp_path: Path) -> None:
    def refuses(message: str, **options: Any) -> None:
        with pytest.raises(lq.LoopQError, match=message):
            write_genai_config(tmp_path, **{"eos_token_id": 0, **options})
        assert not (tmp_path / "genai_config.json").exists()

    refuses("There is no .*cache=True")
    tokens = {"input_ids": (TensorProto.INT64, ["batch", "sequence"])}
    key, value = "past_key_values.0.key", "past_key_values.0.value"
    cache = (TensorProto.FLOAT, ["batch", 2, "past", 16])
    stub(tmp_path, **tokens)
    refuses("key-value cache and logits")
    rolled = (TensorProto.FLOAT, ["loops", "batch", 2, "past", 16])
    stub(tmp_path, **tokens, **{key: rolled, value: rolled}, loops=(TensorProto.INT64, []))
    refuses("form='unrolled'")
    stub(tmp_path, **tokens, **{key: cache, value: cache}, token_type_ids=tokens["input_ids"])
    refuses(r"also takes \['token_type_ids'\]")
    stub(tmp_path, **tokens, **{key: cache, value: (TensorProto.FLOAT, ["batch", 2, "past", 8])})
    refuses(r"caches of one size.*'past', 16.*'past', 8")
    stub(tmp_path, **tokens, **{key: (TensorProto.INT8, cache[1]), value: (TensorProto.INT8, cache[1])})
    refuses("quantized caches")
    stub(tmp_path, **tokens, **{key: cache, value: cache})
    refuses("eos_token_id must be a token id from 0 to 64", eos_token_id=64)
    refuses("eos_token_id is empty", eos_token_id=[])
    refuses("pad_token_id", pad_token_id=-1)
    refuses("context_length", context_length=0)
    assert write_genai_config(tmp_path, eos_token_id=63).is_file()


def tokenizer_of(*, added: tuple[str, str] = ("", ""), prefix: bool = False, normalizer: Any = None) -> Any:
    """Byte-level BPE that puts `added` before and after a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    made, special = Tokenizer(models.BPE()), ["<unk>", "<s>", "</s>"]
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=prefix), decoders.ByteLevel()
    if normalizer is not None:
        made.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=270,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["the number of things"] * 3, trainer)
    if any(added):
        template = f"{added[0]} $A {added[1]}".strip()
        known = [(token, special.index(token)) for token in special]
        made.post_processor = processors.TemplateProcessing(single=template, special_tokens=known)
    return made


def runnable(folder: Path, vocabulary: int = 270) -> None:
    """A file that the runtime opens; it does not keep keys and values."""
    names = [f"{name}.0.{kind}" for name in ("past_key_values", "present") for kind in ("key", "value")]
    cache = [onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 1, "past", 4]) for name in names]
    named = ("input_ids", "attention_mask")
    tokens = [onnx.helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", name]) for name in named]
    logits = onnx.helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "input_ids", vocabulary])
    table = onnx.numpy_helper.from_array(np.eye(vocabulary, dtype=np.float32), "table")
    nodes = [onnx.helper.make_node("Gather", ["table", "input_ids"], ["logits"])]
    nodes += [onnx.helper.make_node("Identity", [names[at]], [names[at + 2]]) for at in (0, 1)]
    graph = onnx.helper.make_graph(nodes, "stub", [*tokens, *cache[:2]], [logits, *cache[2:]], [table])
    opset = [onnx.helper.make_opsetid("", 21)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), folder / "model.onnx")


NAMED = {"bos_token": {"content": "<s>"}, "eos_token": {"content": "</s>"}}


@pytest.mark.parametrize("added", [("", ""), ("<s>", ""), ("", "</s>"), ("<s>", "</s>"), ("</s>", "")])
@pytest.mark.parametrize("settings", [None, {}, NAMED, {**NAMED, "eos_token": "</s>"}])
def test_tokens_that_a_tokenizer_adds(tmp_path: Path, added: tuple[str, str], settings: Any) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="needs the extra `genai`")
    tokenizer, text = tokenizer_of(added=added), "the number of <s> things"
    runnable(tmp_path)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    completed = with_special_tokens(settings or {}, tokenizer)
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(completed))
    write_genai_config(tmp_path, eos_token_id=2)
    reader, notes = genai.Tokenizer(genai.Model(str(tmp_path))), notes_for(tokenizer, completed)
    assert (reader.encode(text).tolist() == tokenizer.encode(text).ids) == (not notes)
    if any(added):
        reader.update_options(add_special_tokens="true")
        promised = 'add_special_tokens="true"' in "".join(notes)
        assert not promised or reader.encode(text).tolist() == tokenizer.encode(text).ids
        assert promised or "give it token ids" in "".join(notes)
        assert promised or settings, "what nobody has set is set so that they are the same"


def test_tokenizers_that_the_runtime_reads_otherwise(tmp_path: Path) -> None:
    from tokenizers import normalizers

    genai = pytest.importorskip("onnxruntime_genai", reason="needs the extra `genai`")
    runnable(tmp_path)
    write_genai_config(tmp_path, eos_token_id=2)
    model = genai.Model(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    changed = {
        "a space before a text": tokenizer_of(prefix=True),
        r"normalizer \(Lowercase\)": tokenizer_of(normalizer=normalizers.Lowercase()),
    }
    for reason, tokenizer in changed.items():
        (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
        (note,) = notes_for(tokenizer, {})
        assert re.search(reason, note)
        assert genai.Tokenizer(model).encode("The number").tolist() != tokenizer.encode("The number").ids


def test_one_token_fills_up_where_several_end(tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="needs the extra `genai`")
    runnable(tmp_path)
    for ends, written in (([2, 5], [2, 5]), (np.array([5, 2]), [5, 2]), ([5, 5], 5), (np.int64(5), 5)):
        write_genai_config(tmp_path, eos_token_id=ends)
        config = json.loads((tmp_path / "genai_config.json").read_text())["model"]
        assert config["eos_token_id"] == written and config["pad_token_id"] == np.ravel(ends)[0]
        model = genai.Model(str(tmp_path))
        (tmp_path / "tokenizer.json").write_text(tokenizer_of().to_str())
        (tmp_path / "tokenizer_config.json").write_text("{}")
        assert genai.Tokenizer(model).eos_token_ids.tolist() == list(np.ravel(written))
    with pytest.raises(lq.LoopQError, match="pad_token_id must be a token id"):
        write_genai_config(tmp_path, eos_token_id=2, pad_token_id=[2, 5])  # type: ignore[arg-type]
    with pytest.raises(lq.LoopQError, match="eos_token_id must be a token id"):
        write_genai_config(tmp_path, eos_token_id=True)
