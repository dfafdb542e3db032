"""lm-eval on tasks with local data."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import loopq_compile as lq
from loopq_compile import bundled
from loopq_compile.backends.onnx import OnnxExecutable
from loopq_compile.errors import LoopQError
from loopq_compile.evaluation.lm_eval import LanguageModel, run_tasks
from tests.cli_models import tiny_ouro, tokenizer

CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
WORDS = """
task: tiny_words
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: word_perplexity}}]
"""
ANSWER = """
task: tiny_answer
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["w9"], max_gen_toks: 3}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def successor(ids: Tensor) -> Tensor:
    """After word n comes word n + 1, almost surely."""
    return torch.nn.functional.one_hot((ids + 1) % 64, 64).float() * 9


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = [
        {"question": "w1 w2", "choices": ["w3", "w7", "w9"], "answer": 0},
        {"question": "w20", "choices": ["w30 w31", "w21 w22", "w21 w30"], "answer": 1},
        {"question": "w5", "choices": ["w6", "w8", "w9"], "answer": 1},
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, data)))
    for number, text in enumerate((CHOICE, WORDS, ANSWER)):
        (tmp_path / f"task{number}.yaml").write_text(text.format(file=tmp_path / "data.jsonl"))
    return tmp_path


def request(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


def test_log_likelihoods_are_sums_over_the_continuation() -> None:
    model = LanguageModel(tiny_ouro(), tokenizer(), batch_size=2)
    pairs = [("w1 w2", " w3"), ("w4", " w5 w6 w7"), ("", "w8 w9"), ("w1 w2 w3 w4 w5", " w6 w6")]
    found = model.loglikelihood([request(*pair) for pair in pairs], disable_tqdm=True)
    for (context, continuation), (score, _) in zip(pairs, found, strict=True):
        before = tokenizer().encode(context).ids or [0]
        ids = before + tokenizer().encode(continuation).ids
        with torch.no_grad():
            logp = tiny_ouro()(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = sum(float(logp[i - 1, ids[i]]) for i in range(len(before), len(ids)))
        assert score == pytest.approx(expected, rel=1e-4)


def test_greedy_continuations_are_recognised() -> None:
    model = LanguageModel(successor, tokenizer())
    pairs = [("w1", " w2 w3"), ("w1", " w2 w4"), ("w1", " w5")]
    found = model.loglikelihood([request(*pair) for pair in pairs], disable_tqdm=True)
    assert [greedy for _, greedy in found] == [True, False, False]
    assert found[0][0] == max(score for score, _ in found)


def test_rolling_log_likelihood_counts_every_token_once() -> None:
    text = " ".join(f"w{(5 * i) % 63}" for i in range(40))
    uniform = LanguageModel(lambda ids: torch.zeros(*ids.shape, 64), tokenizer(), max_length=7)
    (total,) = uniform.loglikelihood_rolling([request(text)], disable_tqdm=True)
    assert total == pytest.approx(-40 * math.log(64), rel=1e-6)


def test_long_contexts_lose_their_beginning() -> None:
    lengths = []

    def model(ids: Tensor) -> Tensor:
        lengths.append(ids.shape[1])
        return successor(ids)

    made = LanguageModel(model, tokenizer(), max_length=5)
    context = " ".join(f"w{i}" for i in range(20))
    ((_, greedy),) = made.loglikelihood([request(context, " w20 w21")], disable_tqdm=True)
    assert lengths == [5] and greedy


def test_texts_end_at_stop_strings() -> None:
    model = LanguageModel(successor, tokenizer())
    requests = [request("w1", {"until": ["w5"], "max_gen_toks": 9}), request("w1", {"max_gen_toks": 2})]
    assert [text.strip() for text in model.generate_until(requests, disable_tqdm=True)] == ["w2 w3 w4", "w2 w3"]


def test_tasks_on_local_data(tasks: Path) -> None:
    model = LanguageModel(successor, tokenizer())
    names = ["tiny_choice", "tiny_words", "tiny_answer"]
    found = run_tasks(model, names, folder=str(tasks))
    assert found["tiny_choice"]["acc,none"] == pytest.approx(2 / 3)
    assert found["tiny_words"]["word_perplexity,none"] > 1
    assert set(found) == set(names)
    assert run_tasks(model, ["tiny_choice"], folder=str(tasks), limit=1)["tiny_choice"]["acc,none"] == 1


def test_programs_onnx_files_and_the_command_line(
    tasks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from typer.testing import CliRunner

    from loopq_compile.cli import app
    from loopq_compile.sources.loading import Loaded, save_beside

    monkeypatch.setattr(bundled, "load_model", tiny_ouro)
    monkeypatch.setattr(bundled, "load_tokenizer", tokenizer)
    program = lq.compile(tiny_ouro(), torch.ones(2, 8, dtype=torch.int64), scheme="w8a8", method="symmetric")
    program.export_onnx(tasks / "onnx")
    save_beside(Loaded(None, tokenizer()), tasks / "onnx")
    executable = LanguageModel(OnnxExecutable(tasks / "onnx" / "model.onnx"), tokenizer())
    scores = [
        model.loglikelihood([request("w1 w2", " w3 w4")], disable_tqdm=True)[0][0]
        for model in (LanguageModel(program, tokenizer()), executable, LanguageModel(path=str(tasks / "onnx")))
    ]
    assert scores[1] == pytest.approx(scores[0], rel=1e-2) and scores[2] == scores[1]
    options = ["--tasks", "tiny_choice", "--task-folder", str(tasks), "--json"]
    result = CliRunner().invoke(app, ["eval", "bundled", str(tasks / "onnx"), *options])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout[result.stdout.index("{") :])
    assert set(report["results"]) == {"bundled", str(tasks / "onnx")}
    shown = CliRunner().invoke(app, ["eval", "bundled", *options[:-1]]).output
    assert "tiny_choice" in shown and "acc" in shown


def test_unknown_tasks_and_data_out_of_reach(tasks: Path) -> None:
    model = LanguageModel(successor, tokenizer())
    with pytest.raises(LoopQError, match="Did you mean 'hellaswag'"):
        run_tasks(model, ["hellaswagg"])
    text = CHOICE.format(file=tasks / "none.jsonl").replace("tiny_choice", "tiny_lost")
    (tasks / "lost.yaml").write_text(text)
    with pytest.raises(LoopQError, match="tiny_lost cannot be had"):
        run_tasks(model, ["tiny_lost"], folder=str(tasks))


def test_a_tokenizer_is_needed() -> None:
    with pytest.raises(LoopQError, match="--tokenizer"):
        LanguageModel(successor)
