"""Log-likelihoods and answers equal those of lm-eval's own `HFLM` on the same model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from loopq_compile.capture.to_graph import capture
from loopq_compile.errors import LoopQError
from loopq_compile.evaluation.lm_eval import LanguageModel
from loopq_compile.program import Program
from loopq_compile.sources.loading import load_model, save_beside
from loopq_compile.storage.artifact import save

CHAT = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
PAIRS = [
    ("The cat", " sat"),
    ("The cat ", "sat on the mat"),
    ("", "hello"),
    ("über 猫", " schläft 🐈"),
    ("a" * 70, " b c"),
    ("x", "y" * 20),
    ("<s>once", " upon"),
    ("", "<s>once"),
]
TEXTS = ["", "short", "a longer text, with ümlauts and 猫 " * 6]
QUESTIONS = [
    ("The cat", {"until": ["\n\n", "q"], "max_gen_toks": 12}),
    ("über", {"until": "é", "max_gen_toks": 9}),
    ("a" * 90, {"until": [], "max_gen_toks": 16}),
    ("w", {"do_sample": False, "temperature": 0.0, "max_gen_toks": 20}),
]


class Case(NamedTuple):
    """A model in a folder, and the reference that reads the same folder."""

    folder: Path
    model: Any
    reference: HFLM


def byte_level(bos: bool) -> Tokenizer:
    """A token for every byte; `<s>` begins each text where the tokenizer has one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens([AddedToken(text, special=True) for text in ("<s>", "</s>")])
    if bos:
        made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 256)])
    made.enable_truncation(5)
    made.enable_padding(length=40)
    return made


def network(name: str) -> Any:
    sizes = {"vocab_size": 264, "bos_token_id": 256, "eos_token_id": 257}
    if name == "gpt2":
        config = transformers.GPT2Config(n_positions=64, n_embd=32, n_layer=2, n_head=2, **sizes)
    else:
        config = transformers.LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=48, **sizes,
        )  # fmt: skip
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    return made


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    bos = request.param == "llama"
    named: dict[str, Any] = {"bos_token": "<s>"} if bos else {}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_level(bos), eos_token="</s>", pad_token="</s>", chat_template=CHAT, **named
    )
    model = network(request.param)
    ends = model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=6, do_sample=False)[0, 5]
    model.generation_config.eos_token_id = [257, int(ends), 17]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    byte_level(bos).save(str(folder / "tokenizer.json"))
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    return Case(folder, model, HFLM(pretrained=model, tokenizer=reference, batch_size=3, device="cpu"))


@pytest.fixture(scope="module", params=["model", "program", "onnx"])
def harness(request: pytest.FixtureRequest, case: Case, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """The model itself, a saved program and an exported file, each by its path."""
    path, loaded = case.folder, load_model(case.folder)
    if request.param != "model":
        path = tmp_path_factory.mktemp(request.param)
        example = torch.ones(2, 9, dtype=torch.int64)
        program = Program(capture(loaded.model, {"input_ids": example, "attention_mask": torch.ones_like(example)}))
        if request.param == "program":
            save(program.graph_module, path, loaded.files())
        else:
            program.export_onnx(path)
            save_beside(loaded, path)
        if case.model.config.model_type == "llama":  # transformers adds its own post-processor to GPT-2's
            assert (path / "tokenizer.json").read_bytes() == (case.folder / "tokenizer.json").read_bytes()
    return LanguageModel(path=str(path), batch_size=3)


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    return [Instance(kind, {}, given, number) for number, given in enumerate(arguments)]  # type: ignore[arg-type]


def test_settings_are_those_of_the_reference(case: Case, harness: LanguageModel) -> None:
    reference = case.reference
    assert harness.prefix_token_id == reference.prefix_token_id
    assert harness.eot_token_id == reference.eot_token_id
    assert harness.max_length == reference.max_length
    history = [{"role": "user", "content": "hi"}]
    assert harness.apply_chat_template(history) == reference.apply_chat_template(history)
    assert harness.chat_template(True) == reference.chat_template(True)


def test_log_likelihoods(case: Case, harness: LanguageModel) -> None:
    # if `<s>` is a token, the last pair has only a prefix token: the reference scores what follows it
    requests = instances("loglikelihood", PAIRS)
    expected = case.reference.loglikelihood(requests, disable_tqdm=True)
    found = harness.loglikelihood(requests, disable_tqdm=True)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4, rel=1e-6)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_rolling_log_likelihoods(case: Case, harness: LanguageModel) -> None:
    requests = instances("loglikelihood_rolling", [(text,) for text in TEXTS[1:]])
    expected = case.reference.loglikelihood_rolling(requests, disable_tqdm=True)
    assert harness.loglikelihood_rolling(requests, disable_tqdm=True) == pytest.approx(expected, abs=1e-4, rel=1e-6)


def test_answers(case: Case, harness: LanguageModel) -> None:
    for question in QUESTIONS:  # one at a time: the reference continues a row until the last row of its batch has ended
        requests = instances("generate_until", [question])
        expected = case.reference.generate_until(requests, disable_tqdm=True)
        assert harness.generate_until(requests, disable_tqdm=True) == expected, question


def test_what_cannot_be_scored_is_refused(case: Case) -> None:
    harness = LanguageModel(path=str(case.folder))
    long, empty = SimpleNamespace(args=("a", "b" * 99)), SimpleNamespace(args=("a", ""))
    for request in (long, empty):
        with pytest.raises(LoopQError, match="A continuation has"):
            harness.loglikelihood([request], disable_tqdm=True)
    with pytest.raises(LoopQError, match="asks for 64 tokens"):
        harness.generate_until([SimpleNamespace(args=("a", {"max_gen_toks": 64}))], disable_tqdm=True)


def test_logits_of_the_last_token_are_not_enough(case: Case, tmp_path: Path) -> None:
    loaded = load_model(case.folder)
    program = Program(capture(loaded.model, torch.ones(2, 9, dtype=torch.int64)))
    program.export_onnx(tmp_path, cache=True, last_token=True)
    save_beside(loaded, tmp_path)
    harness = LanguageModel(path=str(tmp_path))
    with pytest.raises(LoopQError, match="Log-likelihoods need logits for every token"):
        harness.loglikelihood(instances("loglikelihood", PAIRS[:1]), disable_tqdm=True)
    requests = instances("generate_until", QUESTIONS[:1])
    expected = case.reference.generate_until(requests, disable_tqdm=True)
    assert harness.generate_until(requests, disable_tqdm=True) == expected
