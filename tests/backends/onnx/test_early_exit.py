"""Files that stop their loop early, equal to the program that does."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import torch
from typer.testing import CliRunner

import loopq_compile as lq
from loopq_compile.backends.onnx import OnnxExecutable, export
from loopq_compile.cli import app
from loopq_compile.generation.decoders import Chosen
from loopq_compile.generation.sampling import generate
from tests.cli_models import TEXT, tiny_ouro, tokenizer
from tests.decoding import ids
from tests.passes.loops.test_exit_early import program


def check_condition(path: Path) -> None:
    """The body computes the loop's condition: a comparison, or that the threshold allows no stop."""
    loop = next(node for node in onnx.load(path).graph.node if node.op_type == "Loop")
    body = loop.attribute[0].g
    makers = {name: node for node in body.node for name in node.output}
    assert makers[makers[body.output[0].name].input[0]].op_type in ("Or", "BitwiseOr")


@pytest.mark.parametrize(("target", "masked"), [("qdq", True), ("onnxruntime", False)])
def test_files_stop_where_programs_do(target: str, masked: bool, tmp_path) -> None:
    early = program(masked=masked).with_early_exit()
    report = export(program(masked=masked).graph_module, tmp_path, target=target, form="rolled", early_exit=True)
    run = OnnxExecutable(report.path, threads=1)
    assert run.input_names[-1] == "loops" and "exit_threshold" in run.input_names
    mask = torch.ones_like(ids())
    mask[1, :3] = 0
    given = {"attention_mask": mask} if masked else {}
    spent = set()
    for threshold in (None, 0.9, 0.6, 1e-6):
        expected, result = (call(ids(), exit_threshold=threshold, **given) for call in (early, run))
        assert int(result["loops_spent"]) == int(expected["loops_spent"])
        for name in ("logits", "exit_logits"):
            torch.testing.assert_close(result[name], expected[name], rtol=1e-3, atol=1e-3)
        spent.add(int(result["loops_spent"]))
    assert len(spent) > 1
    if not masked:
        whole = export(program().graph_module, tmp_path / "whole", target=target, form="rolled")
        unable = OnnxExecutable(whole.path, threads=1)
        assert torch.equal(unable(ids()).logits, run(ids())["logits"])
        with pytest.raises(lq.LoopQError, match="early_exit=True"):
            unable.decoder(exit_threshold=0.5)
    with pytest.raises(lq.LoopQError, match="form='rolled'"):
        export(program(masked=masked).graph_module, tmp_path, early_exit=True)
    check_condition(report.path)


def test_work_is_saved_with_a_cache(tmp_path) -> None:
    report = export(program().graph_module, tmp_path, form="rolled", target="onnxruntime", cache=True, early_exit=True)
    run, tokens = OnnxExecutable(report.path, threads=1), ids(2, 6)
    early = program().with_early_exit(cache=True)
    for threshold in (None, 0.3):
        made = [Chosen(model, exit_threshold=threshold) for model in (run, early)]
        texts = [generate(chosen, tokens, 6) for chosen in made]
        assert torch.equal(*texts)
        assert made[0].last.loops_spent == made[1].last.loops_spent
        assert (set(made[0].last.loops_spent) == {3}) == (threshold is None)
    first = run(tokens, exit_threshold=1e-6)
    assert torch.equal(first["present.0.key"][0], first["present.0.key"][2])
    assert torch.equal(run(tokens, loops=2)["loops_spent"], torch.tensor(2))


def test_the_command_line(tmp_path) -> None:
    def run(*arguments: object) -> str:
        result = CliRunner().invoke(app, list(map(str, arguments)))
        assert result.exit_code == 0, result.output
        return result.stdout

    folder, words, text = tmp_path / "program", tmp_path / "tokenizer.json", tmp_path / "text.txt"
    lq.compile(tiny_ouro(3), ids(), scheme="w4a16", method="symmetric").save(folder)
    tokenizer().save(str(words))
    text.write_text(TEXT)
    given = ["--tokenizer", words, "--exit-threshold", "0.4", "--json"]
    written = ["--form", "rolled", "--target", "onnxruntime", "--cache", "--early-exit", "--kv-bits", "8", "--json"]
    made = json.loads(run("export", folder, "--out", tmp_path / "onnx", *written))
    assert any(name.startswith("present.0.key: INT8") for name in made["outputs"])
    # The gate of an untrained model gives one half to every token.
    assert json.loads(run("generate", tmp_path / "onnx", "--prompt", "w1 w2", *given))["mean_loops"] == 1
    # Without a threshold the file runs as many loops as it is told to.
    one, four = (
        run("generate", tmp_path / "onnx", "--prompt", "w1", "--loops", n, *given[:2], "--json") for n in (1, 4)
    )
    assert json.loads(one)["mean_loops"] == 1 and json.loads(four)["mean_loops"] == 4
    fixed = CliRunner().invoke(app, ["generate", str(folder), "--prompt", "w1", "--loops", "2", *map(str, given[:2])])
    assert fixed.exit_code == 1 and "--form rolled" in fixed.output
    scored = ["--max-tokens", 40, "--length", 20, "--stride", 20, "--text", text]
    row = json.loads(run("eval", tmp_path / "onnx", *scored, *given))["results"][0]
    assert row["loops"] == 1 and row["perplexity"] > 1
    refused = CliRunner().invoke(app, ["generate", "bundled", "--prompt", "x", "--exit-threshold", "0.5"])
    assert refused.exit_code == 1 and "compile" in refused.output
