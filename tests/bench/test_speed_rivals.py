"""`bench speed --rivals`: other engines on the same model, tokens and threads."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import loopq_compile as lq
from loopq_compile.backends.openvino import OpenVinoExecutable
from loopq_compile.bench import processes, speed_contest, speed_openvino, speed_rivals
from loopq_compile.bench.cells import Cells
from loopq_compile.bench.processes import run_module
from loopq_compile.bench.speed import speed
from loopq_compile.bench.speed_contest import Contest, Contestant
from loopq_compile.bench.speed_fidelity import divergence, rows
from loopq_compile.bench.speed_session import Job
from loopq_compile.capture.to_graph import capture
from loopq_compile.cli import app
from loopq_compile.errors import LoopQError
from loopq_compile.generation.decoders import Decoder
from loopq_compile.program import Program
from loopq_compile.sources.loading import load_model
from tests.backends.gguf.files import VOCABULARY, looped_llama, save_tokenizer, tokens

needs_openvino = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("openvino", "nncf"))), reason="openvino or nncf is not installed"
)


def test_a_crash_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho noise >&2\nkill -SEGV $$\n")
    python.chmod(0o755)
    monkeypatch.setattr(processes.sys, "executable", str(python))
    with pytest.raises(LoopQError, match=r"x could not be measured: the process crashed \(SIGSEGV\)"):
        run_module("speed_session", failed="x could not be measured")


def turns_of(monkeypatch: pytest.MonkeyPatch, folder: Path | None = None) -> tuple[list[str], list[dict[str, object]]]:
    """What three contestants, two of which share a file, do in two turns, and their rows; the last fails."""
    done: list[str] = []

    def fake(job: Job, reference: Path | None) -> dict[str, object]:
        done.append(f"{job.way} {len(job.text)} {reference is not None}")
        if job.way == "c":
            raise LoopQError("it is broken")
        assert Path(job.model).read_text() == "weights"
        rate = float(len(done))
        return {"load_ms": rate, "memory": rate, "peak": rate, "prefill": {"8": rate}, "decode": {"1": 1 / rate}}

    def write(folder: Path) -> tuple[str, dict[str, object]]:
        done.append("write")
        (folder / "file").write_text("weights")
        return "file", {"bytes": 7}

    monkeypatch.setattr(speed_contest, "measure", fake)
    monkeypatch.setattr(speed_contest, "write_reference", lambda job, file: file.write_text(job.way))
    contestants = [Contestant(way, "", way, write, shares="one") for way in "ab"] + [Contestant("c", "", "c")]
    job = Job("m", prefill=(8,), decode=(1,), text=(1, 2))
    return done, Contest(job, 2, Cells(folder), lambda text: None).run(contestants)


def test_contestants_take_turns_and_the_best_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done, found = turns_of(monkeypatch, tmp_path)
    assert done == ["write", "a 2 True", "b 2 True", "c 2 True", "a 0 False", "b 0 False"]
    assert found[0] == {
        **{"runs": "a", "form": "", "bytes": 7, "load_ms": 2.0, "memory": 2.0, "peak": 2.0},
        **{"prefill": {"8": 5.0}, "decode": {"1": 1 / 2}},
    }
    assert found[2] == {"runs": "c", "form": "", "failed": "it is broken"}
    assert turns_of(monkeypatch, tmp_path)[0] == ["c 2 True"], "finished turns are kept, and nothing is written again"


def test_divergence_is_that_of_the_same_logits_read_whole(tmp_path: Path) -> None:
    """Two rows of a text; the contestant's logits depend on the token and its position, like a model's."""
    text, generator = tuple(range(512)), torch.Generator().manual_seed(0)
    ids = rows(text)
    assert ids.shape == (2, 256) and rows(text[:9]).shape == (1, 9)
    exact, other = torch.randn(2, 2, 256, 5, generator=generator)
    np.save(tmp_path / "exact.npy", exact.numpy())

    def decoder(new: Tensor, mask: Tensor) -> Tensor:
        at = mask.shape[1] - 1
        assert torch.equal(new, ids[:, at : at + 1])
        return other[:, at]

    p, q = exact.double().log_softmax(-1), other.double().log_softmax(-1)
    wanted = float((p.exp() * (p - q)).sum(-1).mean())
    assert divergence(lambda: decoder, text, tmp_path / "exact.npy") == pytest.approx(wanted, rel=1e-5)


@needs_openvino
def test_openvino_compresses_our_file(tmp_path: Path) -> None:
    """In floating point it is the program; with weights in 4 bits it is smaller. Fresh decoders start empty."""
    program = Program(capture(looped_llama()))
    source = program.export_openvino(tmp_path / "float", last_token=True)
    speed_openvino.compress(source.path, tmp_path / "int4.xml", 32, 8)
    assert (tmp_path / "int4.bin").stat().st_size < source.path.with_suffix(".bin").stat().st_size / 2
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)

    def read(decoder: Decoder) -> Tensor:
        return torch.stack([decoder(ids[:, a:b], mask[:, :b]) for a, b in ((0, 6), (6, 7), (7, 9))])

    exact = read(program.decoder())
    makers = [OpenVinoExecutable(source.path, threads=1, exact=True).decoder]  # in other ways the cache has 8 bits
    makers.append(speed_openvino.decoders(tmp_path / "int4.xml", "openvino float32"))
    for make, least, most in zip(makers, (0, 1e-2), (1e-5, 0.7), strict=True):
        found = read(make())
        assert found.shape == (3, 2, VOCABULARY)
        assert least <= float((found - exact).norm() / exact.norm()) < most
        torch.testing.assert_close(read(make()), found)


def test_what_cannot_be_compared_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LoopQError, match=r"Unknown rival 'llama'\. Did you mean 'llamacpp'"):
        speed(Job("bundled"), rivals=["llama"])
    with pytest.raises(LoopQError, match="nothing-here is no saved program"):
        speed(Job("bundled"), programs=["nothing-here"])
    monkeypatch.setattr(speed_rivals.importlib.util, "find_spec", lambda name: None)
    assert "no llamacpp row: llama-cpp-python is not installed" in str(speed_rivals.missing("llamacpp"))
    refused = CliRunner().invoke(app, ["bench", "speed", "ouro-1.4b", "--kl-tokens", "64"])
    assert refused.exit_code == 1 and "random weights, so KL" in " ".join(refused.output.split())


def test_a_model_that_llama_cpp_does_not_have_is_refused_before_it_is_compiled(tmp_path: Path) -> None:
    write = speed_rivals._gguf(Job("bundled"), 32)
    with pytest.raises(LoopQError, match="cannot be written as GGUF"):
        write(tmp_path)


@pytest.mark.nightly
@needs_openvino
def test_the_command(tmp_path: Path) -> None:
    """A tiny Llama with a layer that runs twice, in all engines that are installed: each is as near to the model as 4
    bits are, and the float32 file is the model."""
    looped = looped_llama(vocab_size=512)
    plain = type(looped)(looped.config)
    plain.save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("the loop runs the block again and again, " * 9)
    save_tokenizer(tmp_path / "model")
    model = load_model(f"{tmp_path / 'model'}@1x2").model
    lq.compile(model, scheme="w8a16", method="symmetric").save(tmp_path / "careful")
    arguments = ["bench", "speed", str(tmp_path / "model"), "--repeat", "1x2", "--schemes", "w4a16", "--pytorch", ""]
    arguments += ["--programs", str(tmp_path / "careful")]
    arguments += ["--head-bits", "8", "--rivals", "openvino,llamacpp", "--kl-tokens", "40", "--text", str(text)]
    arguments += ["--prefill", "8", "--decode", "2", "--context", "4", "--steps", "2", "--repeats", "1", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    found = {f"{x['runs']}, {x['form']}": x for x in json.loads(result.stdout)["data"]}
    llama = ["llama.cpp Q4_0, head w8, GGUF"] if importlib.util.find_spec("llama_cpp") else []
    compressed = ["OpenVINO int4, head w8, OpenVINO", "OpenVINO int4, head w8, OpenVINO float32"]
    rivals = [*compressed, "ours w4a16, head w8, OpenVINO", "ours w4a16, head w8, OpenVINO float32", *llama]
    own = ["ours w4a16, head w8, unrolled", "ours careful, head w8, unrolled"]
    careful = ["ours careful, head w8, OpenVINO", "ours careful, head w8, OpenVINO float32"]
    assert list(found) == ["ONNX Runtime float32, unrolled", *own, *rivals[:4], *careful, *llama]
    assert found[careful[1]]["kl"] < found[rivals[3]]["kl"] / 10, "8 bits"
    for name in rivals:
        if "crashed" in found[name].get("failed", ""):  # llama.cpp's AMX kernels, compiled by GCC 12
            continue
        assert found[name]["bytes"] < found["ONNX Runtime float32, unrolled"]["bytes"]
        assert min(*found[name]["prefill"].values(), *found[name]["decode"].values()) > 0
        assert math.log10(found[name]["kl"]) == pytest.approx(math.log10(found[list(found)[1]]["kl"]), abs=0.5)
    assert found["ONNX Runtime float32, unrolled"]["kl"] < 1e-6
