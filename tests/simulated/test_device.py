"""Compiling, saving, reading, generating and measuring on a device other than the CPU, which is simulated."""

import copy
import functools
import os

import pytest
import torch
from torch import nn

import loopq_compile as lq
from loopq_compile.calibration import checkpoint, distributed
from loopq_compile.capture import model_checks
from loopq_compile.capture.to_graph import capture
from loopq_compile.compiler import quantize
from loopq_compile.evaluation.perplexity import evaluate
from loopq_compile.generation.sampling import generate
from loopq_compile.graph.copies import copy_on
from loopq_compile.graph.device import CPU, device_of, find_device
from loopq_compile.graph.options import CalibrationOptions
from loopq_compile.methods import METHODS
from loopq_compile.models import Ouro, OuroConfig
from loopq_compile.passes import Pass, PassResult
from tests.simulated.device import DEVICE, Mixed, simulated

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
OPTIONS = {"steps": 4, "evaluate_every": 2, "fused": "off", "transition_rank": 2}
CASES = [(method, "dynamic") for method in METHODS]
CASES += [(method, "static") for method in (METHODS if "LOOPQ_CASES" in os.environ else ("symmetric", "las", "loopq"))]
"""With static scales the others differ in the same way; `make nightly` takes all."""


@pytest.fixture(autouse=True)
def device():
    with simulated() as found:
        yield found


@functools.cache
def model() -> Ouro:
    torch.manual_seed(0)
    config = OuroConfig(**SIZES, num_attention_heads=2, total_ut_steps=2, tie_word_embeddings=False)
    return Ouro(config).eval()


@functools.cache
def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(40, (2, 6), generator=generator) for _ in range(4)]


@functools.cache
def captured():
    return capture(model(), batches()[0])


def compiled(method: str, activation: str, where: torch.device = DEVICE, **options) -> lq.Program:
    """The tiny model behind a method, made on `where`; captured once for all."""
    scheme = lq.Scheme.parse("w4a4", activation=activation, group_size=8)
    pipeline = lq.pipelines.get_pipeline(method)
    return quantize(
        copy_on(captured(), where), scheme, pipeline, batches(), CalibrationOptions(**{**OPTIONS, **options})
    )


made = functools.cache(compiled)


def tensors(program: lq.Program) -> dict[str, torch.Tensor]:
    module = program.graph_module
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def logits(program: lq.Program, ids: torch.Tensor | None = None) -> torch.Tensor:
    return program(batches()[0] if ids is None else ids).logits


def assert_same_numbers(one: lq.Program, other: lq.Program) -> None:
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.cpu().equal(second[name].cpu()), name


def test_the_simulated_device_refuses_what_cuda_refuses():
    x = torch.ones(3, device=DEVICE)
    assert (x + 1).device == DEVICE and (x @ x).item() == 3.0
    for mixed in (
        lambda: x + torch.ones(3),
        lambda: torch.cat([x, torch.ones(3)]),
        lambda: torch.randn(3, device=DEVICE, generator=torch.Generator()),
    ):
        with pytest.raises(Mixed):
            mixed()
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()


@pytest.mark.parametrize("method, activation", CASES)
def test_a_method_compiles_on_a_device_and_its_program_loads_anywhere(tmp_path, method, activation):
    program = made(method, activation)
    places = {tensor.device for tensor in tensors(program).values()}
    assert places == {DEVICE} and program.device == DEVICE
    assert all(
        kwargs.get("device", DEVICE) == DEVICE for kwargs in (n.kwargs for n in program.graph_module.graph.nodes)
    )
    result = logits(program)
    assert result.device == DEVICE
    program.save(tmp_path)
    assert "sim" not in (tmp_path / "program.json").read_text().replace("simul", "")
    loaded = lq.load(tmp_path)
    assert loaded.device == CPU
    assert_same_numbers(program, loaded)
    torch.testing.assert_close(logits(loaded), result.cpu(), rtol=0, atol=1e-5)
    assert logits(loaded.to(DEVICE)).cpu().equal(result.cpu())


@pytest.mark.parametrize(
    "method, activation", [("symmetric", "static"), ("spinquant", "dynamic"), ("loopq", "dynamic")]
)
def test_the_device_changes_nothing_but_rounding(method, activation):
    here, there = tensors(compiled(method, activation, CPU)), tensors(made(method, activation))
    assert here.keys() == there.keys()
    for name, tensor in here.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(there[name].cpu(), tensor, rtol=1e-3, atol=1e-4, msg=name)
        else:
            assert (there[name].cpu() == tensor).float().mean() > 0.98, name


class Killed(BaseException):
    """Ends a calibration as a signal would."""


@pytest.mark.parametrize("method", ["loopq", "spinquant", "flatquant"])
def test_a_killed_calibration_goes_on_with_the_same_numbers(tmp_path, monkeypatch, method):
    options = {"checkpoint": str(tmp_path), "checkpoint_every": 1}
    write, written = checkpoint.write, []

    def write_and_die(path, *rest):
        write(path, *rest)
        written.append(path)
        if len(written) == 3:
            raise Killed

    monkeypatch.setattr(checkpoint, "write", write_and_die)
    with pytest.raises(Killed):
        compiled(method, "dynamic", **options)
    resumed = compiled(method, "dynamic", **options)
    assert len(written) > 3
    assert_same_numbers(resumed, made(method, "dynamic"))


def test_a_model_that_lies_on_a_device_is_compiled_there(monkeypatch):
    monkeypatch.setattr(model_checks, "_check_kinds", lambda model: None)  # which knows tensors by their Python type
    there = copy.deepcopy(model()).to(DEVICE)
    program = lq.compile(there, batches()[0], method="las", group_size=8, calibration=batches())
    assert program.device == DEVICE and device_of(there) == DEVICE
    assert {tensor.device for tensor in tensors(program).values()} == {DEVICE}
    assert_same_numbers(program, made("las", "dynamic"))


def test_compile_moves_a_copy_and_the_model_stays():
    program = lq.compile(model(), batches()[0], method="symmetric", group_size=8, calibration=batches(), device="sim")
    assert program.device == DEVICE and device_of(model()) == CPU
    assert_same_numbers(program, made("symmetric", "dynamic"))
    moved = [batch.to(DEVICE) for batch in batches()]
    again = lq.compile(model(), moved[0], method="symmetric", group_size=8, calibration=moved, device="cpu")
    assert again.device == CPU
    assert_same_numbers(again, program)


def test_release_model_frees_what_was_copied_to_the_device():
    mine = copy.deepcopy(model())
    program = lq.compile(mine, batches()[0], method="symmetric", group_size=8, device="sim", release_model=True)
    assert mine.lm_head.weight.untyped_storage().nbytes() == 0
    assert logits(program).cpu().isfinite().all()


def test_a_program_moves_in_place_and_generates_the_same_text():
    program = compiled("las", "dynamic")
    prompt = batches()[0][:, :4]
    text = program.generate(prompt, max_new_tokens=4)
    assert text.device == CPU, "text comes back where the prompt was"
    assert program.generate(prompt.to(DEVICE), max_new_tokens=4).cpu().equal(text)
    drawn = program.generate(prompt, max_new_tokens=4, do_sample=True, top_k=8)
    shared = program.cached()
    assert shared is not None and {tensor.device for tensor in tensors(shared).values()} == {DEVICE}
    assert program.to("cpu") is program and program.device == CPU
    assert program.generate(prompt, max_new_tokens=4).equal(text)
    assert program.generate(prompt, max_new_tokens=4, do_sample=True, top_k=8).equal(drawn)
    there = logits(program.to("sim"))
    assert there.device == DEVICE and there.cpu().isfinite().all()


def test_a_model_on_a_device_generates():
    there, prompt = copy.deepcopy(model()).to(DEVICE), batches()[0][:, :4]
    assert generate(there, prompt, 3).equal(generate(model(), prompt, 3))


def test_caches_early_exit_and_rolled_loops_run_on_a_device():
    program, ids = made("symmetric", "static"), batches()[0]
    here = copy.deepcopy(program).to("cpu")
    assert program.device == DEVICE
    options = {"cache": True, "last_token": True, "kv_bits": 8}
    other, expected = program.with_early_exit(**options), here.with_early_exit(**options)
    assert {tensor.device for tensor in tensors(other).values()} == {DEVICE}
    torch.testing.assert_close(other(ids)["logits"].cpu(), expected(ids)["logits"], rtol=0, atol=1e-5)
    assert other.to("cpu")(ids)["logits"].device == CPU
    assert program.device == DEVICE and logits(program).device == DEVICE, "a moved variant moves nothing of its source"
    assert logits(program).cpu().equal(program.lower("reference")(ids).logits.cpu())


def test_a_program_is_read_onto_a_device(tmp_path):
    made("las", "static").save(tmp_path)
    program = lq.load(tmp_path, device="sim")
    assert {tensor.device for tensor in tensors(program).values()} == {DEVICE}
    assert_same_numbers(program, made("las", "static"))


def test_perplexity_is_the_same_everywhere():
    program, text = made("loopq", "dynamic"), torch.cat([batch.flatten() for batch in batches()])
    there = evaluate(program, text, teacher=copy.deepcopy(model()).to(DEVICE), length=12, stride=6)
    here = evaluate(copy.deepcopy(program).to("cpu"), text, teacher=model(), length=12, stride=6)
    assert there.perplexity == pytest.approx(here.perplexity, rel=1e-4)
    assert there.kl == pytest.approx(here.kl, rel=1e-3)


def test_an_onnx_file_is_the_same_from_everywhere(tmp_path):
    program = made("symmetric", "static")
    program.export_onnx(tmp_path / "there", form="rolled")
    copy.deepcopy(program).to("cpu").export_onnx(tmp_path / "here", form="rolled")
    there, here = ((tmp_path / name / "model.onnx").read_bytes() for name in ("there", "here"))
    assert there == here and program.device == DEVICE


def test_a_report_compares_a_program_and_a_model_on_different_devices(tmp_path):
    page = made("las", "static").report(tmp_path / "report.html", model=model(), tokens=batches()[:1])
    assert page.stat().st_size > 10_000


class AddsOnTheCpu(Pass):
    """Doubles the logits by a constant that lies on the CPU, as passes of users may make them."""

    def call(self, graph_module):
        from loopq_compile.graph.insert import add_constant

        two = add_constant(graph_module, "two", torch.tensor([2.0]))
        output = next(node for node in graph_module.graph.nodes if node.op == "output")
        with graph_module.graph.inserting_before(output):
            doubled = graph_module.graph.call_function(torch.ops.aten.mul.Tensor, (output.args[0][0], two))
        output.args = ((doubled, *output.args[0][1:]),)
        return PassResult(graph_module, True)


def test_what_a_pass_of_a_user_makes_is_moved_to_the_graph():
    pipeline = lq.Pipeline([*lq.pipelines.symmetric(), AddsOnTheCpu()])
    scheme = lq.Scheme.parse("w4a4", group_size=8)
    program = quantize(copy_on(captured(), DEVICE), scheme, pipeline, batches())
    assert tensors(program)["two"].device == DEVICE
    assert logits(program).cpu().isfinite().all()


@pytest.mark.parametrize("solver", ["gptq", "loaq"])
def test_solvers_run_on_a_device(solver):
    here, there = (compiled("las", "dynamic", where, weight_solver=solver) for where in (CPU, DEVICE))
    torch.testing.assert_close(logits(there).cpu(), logits(here), rtol=0, atol=0.05)


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(lq.LoopQError, match=r"'gpu' is not a device. Use 'auto', 'cpu', 'cuda'"):
        lq.compile(model(), batches()[0], device="gpu")
    with pytest.raises(lq.LoopQError, match="'meta' holds no numbers"):
        find_device("meta")
    if not torch.cuda.is_available():
        with pytest.raises(lq.LoopQError, match=r"device='cuda:1' cannot be used here: .*use 'cpu'"):
            find_device("cuda:1")
        assert find_device("auto") == CPU


@pytest.mark.parametrize("where, backend", [("cpu", "gloo"), ("cuda:1", "cpu:gloo,cuda:nccl")])
def test_the_graphs_device_decides_how_processes_talk(monkeypatch, where, backend):
    """A machine with a GPU may well calibrate on its CPU."""
    seen = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.append(str(device)))
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: False)
    monkeypatch.setattr(distributed.dist, "init_process_group", seen.append)
    monkeypatch.setattr(distributed.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 2)
    assert distributed.world(torch.device(where)) == (0, 2)
    assert seen == ([where] if where != "cpu" else []) + [backend]


def test_plain_modules_have_a_device():
    assert device_of(nn.Linear(2, 2)) == CPU and device_of(nn.Identity()) == CPU
