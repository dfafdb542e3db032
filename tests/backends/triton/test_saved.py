"""Lowered programs in folders, and their compiled kernels.

Without a GPU, Triton's own launcher can still tell what it would compile: a driver names an architecture, and `warmup`
replaces launches. Triton's compilation listener reports whether it finds a shipped kernel or compiles.
"""

import functools
import json
import subprocess
import sys
import warnings

import pytest
import torch
import triton
from safetensors.torch import load_file, save_file
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

import loopq_compile as lq
from loopq_compile.backends.triton import launches, load, operators, save, saved
from loopq_compile.backends.triton.ahead import compile_binary
from loopq_compile.backends.triton.executable import use_kernels
from loopq_compile.backends.triton.static_decoder import step_of
from loopq_compile.generation.decoders import CachedDecoder
from loopq_compile.graph.rolled import rolled_loops
from loopq_compile.graph.state import get_state
from loopq_compile.storage.artifact import read
from loopq_compile.storage.manifest import write_manifest
from tests.tiny import tiny_model, tiny_program, tokens

ARCHITECTURES = (80, 90)
LENGTHS = (1, 2, 7, 16, 17, 100, 128, 129, 300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "lowered"
    found = save(program(), path, architectures=ARCHITECTURES)
    assert found.kernels > 8 and found.architectures == ARCHITECTURES and "sm_80, sm_90" in str(found)
    return path


@functools.cache
def program():
    data = [tokens(seed) for seed in range(3)]
    return lq.compile(tiny_model(2), tokens(), scheme="w4a4", method="loopq", calibration=data, steps=2)


class Driver:
    """What Triton's launcher asks a GPU before it launches."""

    def __init__(self, architecture):
        self.architecture = architecture

    def get_current_target(self):
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self):
        return f"simulated sm_{self.architecture} {id(self)}"

    def get_current_stream(self, device):
        return 0


class Pointer:
    """A tensor as the launcher sees it: a type and an address."""

    def __init__(self, tensor):
        self.dtype, self.offset = tensor.dtype, tensor.storage_offset() * tensor.element_size()

    def data_ptr(self):
        return (1 << 20) + self.offset


class WarmUp:
    """Replaces a kernel: does everything that a launch does, up to the launch."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def call(*args, **kwargs):
            seen = [Pointer(value) if isinstance(value, torch.Tensor) else value for value in args]
            self.kernel.warmup(*seen, grid=grid, **kwargs)

        return call


def ask(monkeypatch, cache, graph_module, architecture, lengths=LENGTHS, loops=1):
    """`(kernel, whether it was found)` for everything that launches with this many tokens request from Triton."""
    asked = []

    def listen(*, src, metadata, metadata_group, times, cache_hit):
        asked.append((src.name, cache_hit))

    monkeypatch.setattr(triton.knobs.cache, "dir", str(cache))
    monkeypatch.setattr(triton.knobs.compilation, "listener", listen)
    monkeypatch.setattr(operators, "launcher", WarmUp)
    monkeypatch.setattr(operators, "architecture_of", lambda device: architecture)
    monkeypatch.setattr(driver, "_active", Driver(architecture))
    for length in lengths:
        launches.run_fake(graph_module, get_state(graph_module).signature, length, loops)
    return asked


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_launch_finds_its_kernel_in_the_folder(folder, tmp_path, monkeypatch, architecture):
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        count = saved.install(folder, architecture)
    asked = ask(monkeypatch, tmp_path, use_kernels(read(folder)), architecture)
    assert {name for name, _ in asked} == {"quantize_kernel", "linear_kernel", "adapter_kernel"}
    assert all(hit for _, hit in asked), [name for name, hit in asked if not hit]
    assert len(asked) <= count


def test_without_the_folder_the_same_launches_compile(folder, tmp_path, monkeypatch):
    """The test above would also pass if nothing were requested."""
    asked = ask(monkeypatch, tmp_path, use_kernels(read(folder)), 90, lengths=[1])
    assert asked and not any(hit for _, hit in asked)


def test_products_split_along_k_are_found_too(tmp_path, monkeypatch):
    """Weights wide enough for the decode variant to split, with a bias, and views that begin in the middle."""
    arguments = (
        torch.zeros(3, 512, dtype=torch.uint8),
        torch.ones(3, 32),
        torch.zeros(1, 32, 48, 16, dtype=torch.uint8),
    )
    arguments = (*arguments, torch.ones(1, 32, 48), torch.ones(48), 0, 32, torch.bfloat16)
    x = torch.zeros(3, 2 * 1000)[:, 1000 - 24 :][:, :992]
    found = []
    with launches.recording(found.append):
        operators.packed_linear(*arguments)
        operators.quantize_packed(x, None, "", "", None, None, 0.0, *[None] * 3, torch.ones(1, 31), 0, 32, 4, -8)
    assert [case.name for case in found] == ["linear_kernel", "sum_parts_kernel", "quantize_kernel"]
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    for case in found:
        compile_binary(case, 86)
    asked = []
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda **about: asked.append(about["cache_hit"]))
    monkeypatch.setattr(operators, "launcher", WarmUp)
    monkeypatch.setattr(driver, "_active", Driver(86))
    operators.packed_linear(*arguments)
    operators.quantize_packed(x, None, "", "", None, None, 0.0, *[None] * 3, torch.ones(1, 31), 0, 32, 4, -8)
    assert asked == [True, True, True]


def test_rolled_programs_and_caches_of_integers_are_found_too(tmp_path, monkeypatch):
    """The loop's body is saved and loaded with the program, which keeps its own graph; kernels serve all lengths."""
    cached = tiny_program().with_cache(last_token=True, kv_bits=4, stacked=True)
    before = cached.graph_module.code
    folder = tmp_path / "lowered"
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "first"))
    save(cached, folder, architectures=[90], rolled=True)
    assert cached.graph_module.code == before
    run = load(folder, fallback=True)
    assert len(rolled_loops(run.graph_module)) == 1
    expected = cached.lower("triton", fallback=True, rolled=True)
    found = [CachedDecoder(executable, executable.signature, 3) for executable in (run, expected)]
    for begin, end in ((0, 6), (6, 7)):
        ids, mask = tokens(3, 2, 7)[:, begin:end], torch.ones(2, end, dtype=torch.int64)
        assert torch.equal(found[0](ids, mask), found[1](ids, mask))
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))
    saved.install(folder, 90)
    graph_module = use_kernels(read(folder))
    asked = ask(monkeypatch, tmp_path / "cache", graph_module, 90, loops=3)
    asked += ask(monkeypatch, tmp_path / "cache", step_of(graph_module), 90, [1], loops=3)
    assert {name for name, _ in asked} >= {"attention_kernel", "join_parts_kernel", "write_cache_kernel"}
    assert all(hit for _, hit in asked), [name for name, hit in asked if not hit]


def test_stale_kernels_are_left_out(folder, tmp_path, monkeypatch):
    """Kernels of another compiler would never be found; kernels with a wrong name must not replace anything."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))
    copy = copied(folder, tmp_path)
    data = json.loads((copy / saved.CASE_FILE).read_text())
    data["triton"] = "3.1"
    tensors = load_file(copy / saved.BINARY_FILE)
    for entry in data["kernels"]:
        for kind in ("json", "cubin"):
            tensors[f"{'0' * 64}.{kind}"] = tensors[f"{entry['key']}.{kind}"].clone()
        entry["key"] = "0" * 64
    (copy / saved.CASE_FILE).write_text(json.dumps(data))
    save_file(tensors, copy / saved.BINARY_FILE)
    write_manifest(copy)
    with pytest.warns(UserWarning, match=r"compiled with Triton 3\.1.*Export the program again"):
        assert saved.install(copy, 90) == 0
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("change", ["cut off", "no json", "unknown kernel"])
def test_damage_is_refused(folder, tmp_path, monkeypatch, change):
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))
    copy = copied(folder, tmp_path)
    if change == "cut off":
        (copy / saved.BINARY_FILE).write_bytes((copy / saved.BINARY_FILE).read_bytes()[:-9])
    else:
        data = json.loads((copy / saved.CASE_FILE).read_text())
        data["kernels"][-1]["name"] = "os.system"
        (copy / saved.CASE_FILE).write_text("{}" if change == "no json" else json.dumps(data))
        write_manifest(copy)
    with pytest.raises(lq.LoopQError, match=r"does not match manifest|cannot be used"):
        saved.install(copy, ARCHITECTURES[-1])


def test_the_loaded_program_runs_without_the_model(folder):
    ids = tokens(5, 2, 9)
    expected = program().lower("triton", fallback=True)(ids)["logits"]
    torch.save(expected, folder.parent / "expected.pt")
    code = f"""
import sys, torch
from loopq_compile.backends.triton import load
run = load({str(folder)!r}, fallback=True)
ids = torch.tensor({ids.tolist()})
assert torch.equal(run(ids)["logits"], torch.load({str(folder.parent / "expected.pt")!r}))
assert any(line.parts for line in run.report)
assert "tests" not in sys.modules and "transformers.modeling_utils" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_lowered_program_is_a_program(folder):
    """Other tools can run it on the operators' definitions."""
    ids = tokens(5, 1, 4)
    run = load(folder, fallback=True)
    assert torch.equal(lq.load(folder)(ids)["logits"], run(ids)["logits"])


def test_refusals(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(lq.LoopQError, match="no NVIDIA GPU"):
        load(folder)
    with pytest.raises(lq.LoopQError, match="sm_75 is not supported"):
        save(tiny_program(), tmp_path / "never", architectures=[75])
    tiny_program().save(tmp_path / "program")
    with pytest.raises(lq.LoopQError, match=r"no lowered program.*--target triton"):
        load(tmp_path / "program", fallback=True)


def copied(folder, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy
