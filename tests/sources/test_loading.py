"""Hugging Face models from folders: types, pickles, memory, and what travels with a compiled program."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import loopq_compile as lq
from loopq_compile import LoopQError
from loopq_compile.cli import app
from loopq_compile.models import repeat_layers
from loopq_compile.sources import hugging_face
from loopq_compile.sources.loading import load_model
from tests.cli_models import TEXT, WORDS, tiny_llama, tokenizer

IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in bfloat16 with tokenizer and generation settings."""
    path = tmp_path_factory.mktemp("models") / "llama"
    model = tiny_llama().to(torch.bfloat16)
    model.generation_config.eos_token_id = [0, 5]
    model.save_pretrained(path)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer(), unk_token=WORDS[0], eos_token=WORDS[0])
    fast.chat_template = "{{ messages }}"
    fast.save_pretrained(path)
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_loaded_in_the_type_that_is_asked_for(folder: Path, dtype: str) -> None:
    model = load_model(f"{folder}@0x2", dtype=dtype).model
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    program = lq.compile(model, scheme="w8a8", method="symmetric")
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits
    found = program(IDS).logits
    assert found.dtype == expected.dtype
    assert 0 < (found - expected).norm() < 0.1 * expected.norm()


def test_benchmarks_load_the_type_that_is_asked_for(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    options = ["--schemes", "w8a8", "--methods", "symmetric", "--activations", "dynamic", "--calibration", "self"]
    options += ["--samples", "1", "--sample-length", "4", "--length", "16", "--stride", "16", "--max-tokens", "32"]
    found = {}
    for dtype in ("float32", "bfloat16"):
        command = ["bench", "quality", f"{folder}@0x2", *options, "--text", str(tmp_path / "text.txt"), "--json"]
        result = CliRunner().invoke(app, [*command, "--dtype", dtype])
        assert result.exit_code == 0, result.output
        report = json.loads(result.stdout)
        assert report["dtype"] == dtype
        found[dtype] = report["rows"][0]["perplexity"]
    assert 0 < abs(found["bfloat16"] / found["float32"] - 1) < 0.01


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_bundled_model_has_a_type_too(dtype: str) -> None:
    assert {p.dtype for p in load_model("bundled", dtype=dtype).model.parameters()} == {getattr(torch, dtype)}


def test_an_unknown_type_is_refused(folder: Path) -> None:
    with pytest.raises(LoopQError, match=r"Unknown dtype 'bfloat61'. Did you mean 'bfloat16'"):
        load_model(folder, dtype="bfloat61")


def test_pickled_weights_are_opened_only_if_asked(folder: Path, tmp_path: Path) -> None:
    model = tiny_llama()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(LoopQError, match=r"it has pytorch_model.bin\); pickled files can run code.*--allow-pickle"):
        load_model(tmp_path)
    loaded = load_model(tmp_path, allow_pickle=True)
    assert loaded.tokenizer is None
    torch.testing.assert_close(loaded.model.lm_head.weight, model.lm_head.weight)


def test_a_pickle_that_would_run_code_is_refused_even_then(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return print, ("ran",)

    tiny_llama().config.save_pretrained(tmp_path)
    torch.save({"lm_head.weight": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(LoopQError, match="cannot be loaded"):
        load_model(tmp_path, allow_pickle=True)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_model_that_does_not_fit_is_refused_with_advice(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sharded: bool
) -> None:
    source = folder
    if sharded:
        source = tmp_path
        tiny_llama().to(torch.bfloat16).save_pretrained(source, max_shard_size="20KB")
        assert (source / "model.safetensors.index.json").is_file()
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    monkeypatch.setattr(hugging_face, "available_memory", lambda: int(1.5 * stored))
    with pytest.raises(LoopQError, match=r"GB of memory in float32.*--dtype bfloat16.*device_map.*cannot be captured"):
        load_model(source)
    assert load_model(source, dtype="bfloat16").kind == "model"


def test_models_spread_over_devices_are_refused_with_advice() -> None:
    model = tiny_llama()
    model.hf_device_map = {"model.embed_tokens": "cpu", "model.layers": "disk"}
    with pytest.raises(LoopQError, match=r"spread over cpu, disk \(device_map\).*without device_map.*bfloat16"):
        lq.compile(model, scheme="w4a16", method="symmetric")


def test_releasing_the_model_frees_what_was_packed_and_changes_nothing() -> None:
    def compiled(release: bool) -> tuple[torch.nn.Module, lq.Program]:
        model = repeat_layers(tiny_llama(), 0, 0, 2)
        return model, lq.compile(model, scheme="w4a4", method="symmetric", release_model=release)

    (kept, first), (released, second) = compiled(False), compiled(True)
    torch.testing.assert_close(second(IDS).logits, first(IDS).logits, rtol=0, atol=0)
    empty = {name for name, tensor in released.named_parameters() if not tensor.untyped_storage().nbytes()}
    assert empty == {name for name, _ in kept.named_parameters() if name.endswith("_proj.weight")}
    assert all(tensor.untyped_storage().nbytes() for tensor in kept.parameters())


MEASURE = """
import sys, threading, time
import torch, transformers
from pathlib import Path
import loopq_compile as lq
from loopq_compile import compiler
from loopq_compile.sources.loading import load_model

def resident():
    pages = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(pages["RssAnon"].split()[0]) * 1024

lq.compile(load_model(sys.argv[1]).model, scheme="w4a4", method="symmetric", weight_range="minmax")  # warms up
before, peak, done = resident(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, resident())
        time.sleep(0.005)

watcher = threading.Thread(target=watch)
watcher.start()
model = load_model(sys.argv[2]).model
size = sum(tensor.nbytes for tensor in model.parameters())
lq.compile(model, scheme="w4a4", method="symmetric", weight_range="minmax", release_model=True)
done = True
watcher.join()
print((peak - before) / size)
"""


@pytest.mark.nightly
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from Linux's /proc")
def test_loading_and_packing_stay_near_one_copy(folder: Path, tmp_path: Path) -> None:
    """A model of 25 million parameters, stored in bfloat16, loaded in float32: about one copy, 109 MB.

    Whenever large memory is freed, glibc's allocator raises the size from which it returns memory at once. It then
    leaves holes that depend on the order of threads: the same run measured 1.20 to 1.37 copies. With that size fixed,
    the test measures what the compiler holds: 1.15 to 1.18 copies in twenty runs on a busy machine.
    """
    config = transformers.LlamaConfig(
        vocab_size=2048, hidden_size=512, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=8
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    command = [sys.executable, "-c", MEASURE, str(folder), str(tmp_path)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) < 1.25


def test_tokenizer_and_settings_travel_along(folder: Path, tmp_path: Path) -> None:
    program, onnx = tmp_path / "program", tmp_path / "onnx"
    for command in (
        ["compile", folder, "--scheme", "w8a8", "--method", "symmetric", "--out", program],
        ["export", program, "--out", onnx],
    ):
        result = CliRunner().invoke(app, [str(part) for part in command])
        assert result.exit_code == 0, result.output
    for made in (program, onnx):
        settings = json.loads((made / "generation_config.json").read_text())
        assert settings["eos_token_id"] == [0, 5]
        again = transformers.AutoTokenizer.from_pretrained(made)
        assert again("w3 w5").input_ids == [4, 6] and again.eos_token == WORDS[0]
        assert again.chat_template == "{{ messages }}"


def test_generation_ends_at_each_of_the_end_tokens(folder: Path) -> None:
    program = lq.compile(load_model(folder).model, scheme="w8a8", method="symmetric")
    free = program.generate(IDS[:1], max_new_tokens=8)[0, 9:].tolist()
    end = free[2]
    stopped = program.generate(IDS[:1], max_new_tokens=8, eos_token_id=[63 if end != 63 else 62, end])[0, 9:].tolist()
    assert stopped == free[: free.index(end) + 1]


def damaged(folder: Path, tmp_path: Path, **configuration: object) -> Path:
    """A copy of `folder` with another config.json."""
    copied = tmp_path / "copy"
    shutil.copytree(folder, copied)
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, **configuration}))
    return copied


def test_weights_that_the_files_lack_are_not_left_random(folder: Path, tmp_path: Path) -> None:
    copied = damaged(folder, tmp_path)
    weights = load_file(copied / "model.safetensors")
    name = next(name for name in weights if "up_proj" in name)
    del weights[name]
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoopQError, match=rf"lack weight '{name}'.* left random\. Download"):
        load_model(str(copied))


def test_weights_of_another_shape_than_the_configuration_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LoopQError, match=r"weight '.*mlp.*' is stored as \[\d+, \d+\], the configuration makes it"):
        load_model(str(damaged(folder, tmp_path, intermediate_size=96)))


def test_a_missing_part_of_the_weights_is_called_that(folder: Path, tmp_path: Path) -> None:
    copied = tmp_path / "parts"
    tiny_llama().save_pretrained(copied, max_shard_size="20KB")
    parts = sorted(copied.glob("model-*.safetensors"))
    parts[1].unlink()
    with pytest.raises(LoopQError, match=rf"part of the weights .* is missing; download it again.*{parts[1].name}"):
        load_model(str(copied))


def test_checkpoints_that_are_already_quantized_are_refused_before_they_are_loaded(
    folder: Path, tmp_path: Path
) -> None:
    copied = damaged(folder, tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    (copied / "model.safetensors").unlink()
    with pytest.raises(LoopQError, match=r"already quantized \(gptq\).*original weights"):
        load_model(str(copied))
