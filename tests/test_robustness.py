"""Random models through every scheme and both ONNX forms; threads; processes; kills."""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import loopq_compile as lq
from loopq_compile.backends.onnx import OnnxExecutable
from loopq_compile.cli import app
from loopq_compile.errors import InternalError
from tests.capture.test_random import Random, plans
from tests.cases import cases
from tests.cli_models import tiny_llama
from tests.tiny import tiny_model, tiny_program, tokens
from tests.zoo_models import VOCABULARY

ROOT = Path(__file__).parent.parent
schemes = st.builds(
    lq.Scheme,
    weight_bits=st.integers(2, 8),
    activation_bits=st.sampled_from([4, 6, 8, 16]),
    group_size=st.sampled_from([8, -1]),
    activation=st.sampled_from(["static", "dynamic"]),
    signed_scales=st.booleans(),
)


LEARNED = ["loopq", "loopq-paper", "flatquant-e2e", "flatquant", "spinquant"]


def ids(seed, shape=(2, 5)):
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def close(actual, expected, scheme):
    """A code that rounds the other way changes results; how much depends on the width."""
    error = float((actual - expected).norm() / expected.norm())
    assert error < (1e-4 if scheme.activation_bits == 16 else 0.05 if scheme.activation_bits >= 6 else 0.3), error


@cases(2)
@given(plans, schemes, st.sampled_from(["symmetric", "las"]))
def test_random_models_go_through_every_scheme_and_both_forms(tmp_path_factory, plan, scheme, method):
    program = lq.compile(Random(plan).eval(), ids(0), scheme=scheme, method=method, calibration=[ids(1), ids(2)])
    through(program, scheme, tmp_path_factory.mktemp("random"))


def through(program, scheme, folder):
    """Saves, loads and exports a program in both forms, and compares what they compute."""
    program.save(folder / "p")
    x = ids(3, (3, 4))
    assert torch.equal(lq.load(folder / "p")(x), program(x))
    for form in ("unrolled", "rolled"):
        report = program.export_onnx(folder / form, form=form)
        close(torch.as_tensor(OnnxExecutable(report.path)(x)), program(x), scheme)


@cases(1)
@given(
    plans, st.sampled_from(["w4a4", "w4a8", "w3a6"]), st.sampled_from(LEARNED), st.sampled_from(["static", "dynamic"])
)
def test_random_models_are_learned_for_a_few_steps(tmp_path_factory, plan, scheme, method, activation):
    model, data = Random(plan).eval(), [ids(seed, (2, 16)) for seed in range(4)]
    scheme = lq.Scheme.parse(scheme, group_size=8, activation=activation)
    program = lq.compile(model, ids(0), scheme=scheme, method=method, calibration=data, steps=2, batch_rows=2)
    through(program, scheme, tmp_path_factory.mktemp("learned"))


def test_threads_share_a_loaded_program(tmp_path):
    tiny_program().save(tmp_path / "p")
    program = lq.load(tmp_path / "p")
    inputs = [tokens(seed, 1 + seed % 3, 4 + seed) for seed in range(12)]
    expected = [program(x)["logits"] for x in inputs]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda x: program(x)["logits"], inputs * 3))
    assert all(torch.equal(a, b) for a, b in zip(found, expected * 3, strict=True))


def test_a_seed_gives_the_same_program_in_every_process(tmp_path):
    script = (
        "import sys, loopq_compile as lq\nfrom tests.tiny import tiny_model, tokens\n"
        "data = [tokens(s) for s in range(4)]\n"
        "for name, seed in (('a', 3), ('b', 4))[: int(sys.argv[2])]:\n"
        "    p = lq.compile(tiny_model(2), tokens(), scheme='w4a8', method='quarot', calibration=data, seed=seed)\n"
        "    p.save(sys.argv[1] + name)\n"
    )
    sums = []
    for number in "12":
        environment = {**os.environ, "PYTHONHASHSEED": number, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", script, str(tmp_path / number), number]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        manifests = [tmp_path / f"{number}{name}" / "manifest.json" for name in "ab"[: int(number)]]
        sums.append([json.loads(path.read_text())["files"] for path in manifests])
    assert sums[0][0] == sums[1][0], "graph and tensors, to the last bit"
    assert sums[1][0] != sums[1][1], "another seed gives other signs"


def test_an_export_that_is_killed_leaves_the_older_file_and_can_be_repeated(tmp_path):
    tiny_program("w8a8").save(tmp_path / "p")
    lq.load(tmp_path / "p").export_onnx(tmp_path / "onnx")
    before = (tmp_path / "onnx" / "model.onnx").read_bytes()
    script = (
        "import os, signal, sys, loopq_compile as lq\n"
        "program = lq.load(sys.argv[1])\n"
        "kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "os.replace = os.rename = kill\n"
        "program.export_onnx(sys.argv[2], target='onnxruntime')\n"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "p", tmp_path / "onnx"], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "onnx" / "model.onnx").read_bytes() == before
    lq.load(tmp_path / "p").export_onnx(tmp_path / "onnx", target="onnxruntime")
    assert (tmp_path / "onnx" / "model.onnx").read_bytes() != before


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8"])
def test_a_dry_run_predicts_the_size_and_writes_nothing(scheme, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "m")
    arguments = ["compile", f"{tmp_path / 'm'}@0-1x2", "--scheme", scheme, "--method", "symmetric", "--json"]
    predicted = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "p"), "--dry-run"])
    assert predicted.exit_code == 0 and not (tmp_path / "p").exists()
    assert CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "p")]).exit_code == 0
    found = json.loads(predicted.stdout)
    actual = (tmp_path / "p" / "tensors.safetensors").stat().st_size
    assert found["bytes"] == pytest.approx(actual, rel=0.15) and found["seconds"] is None
    assert found["memory"] >= found["bytes"] and found["quantized"] == 14


def test_a_defect_ends_with_its_own_status(monkeypatch, tmp_path):
    def broken(*_, **__):
        raise InternalError("something of ours broke")

    monkeypatch.setattr("loopq_compile.storage.artifact.verify", broken)
    done = CliRunner().invoke(app, ["verify", str(tmp_path)])
    assert done.exit_code == 70 and "something of ours broke" in done.stderr and "defect" in done.stderr


def test_shells_can_complete():
    asked = {"_LOOPQ_COMPILE_COMPLETE": "complete_bash", "COMP_WORDS": "loopq-compile ver", "COMP_CWORD": "1"}
    done = CliRunner().invoke(app, [], prog_name="loopq-compile", env=asked)
    assert done.stdout.split() == ["verify"]


def test_the_estimate_times_a_batch():
    from loopq_compile.analysis.estimate import estimate
    from loopq_compile.capture.to_graph import capture
    from loopq_compile.graph.options import CalibrationOptions
    from loopq_compile.graph.state import get_state

    graph, data = capture(tiny_model(), tokens()), [tokens(1), tokens(2)]
    nodes = len(graph.graph.nodes)
    plain = estimate(graph, lq.Scheme.parse("w4a8"), lq.pipelines.symmetric(), data)
    learned = estimate(graph, lq.Scheme.parse("w4a8"), lq.pipelines.loopq(), data)
    assert 0 < plain.seconds < learned.seconds and plain.memory < learned.memory
    assert estimate(graph, lq.Scheme.parse("w4a8"), lq.pipelines.symmetric()).seconds is None
    assert plain.bytes < learned.bytes, "selected groups have weights per loop"
    few, many = (
        estimate(graph, lq.Scheme.parse("w4a8"), lq.pipelines.flatquant_e2e(), data, options)
        for options in (CalibrationOptions(steps=steps, fused="off") for steps in (1, 20_000))
    )
    assert many.seconds > 5 * few.seconds, "what one step takes, on a machine that may be busy"
    assert len(graph.graph.nodes) == nodes and not get_state(graph).log, "the model's graph stays as it was"
