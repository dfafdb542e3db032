"""Names that Python, PyTorch or the compiler itself use: a model may have them all, and sees its own names."""

import json
import math
import operator
from concurrent.futures import ThreadPoolExecutor

import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from typer.testing import CliRunner

import loopq_compile as lq
from loopq_compile.backends.onnx import OnnxExecutable
from loopq_compile.cli import app
from loopq_compile.graph.names import safe_argument, safe_name, shown_name

IDS = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(0))
KEYS = ["in", "None", "a-b", "a_b", 'a"b\\', "µ"]
ROOT = ["graph", "lambda", "loop_0", "transform", "loopq_in"]


class Odd(nn.Module):
    """A loop of linears with odd names: in a dict, at the root, as separate parameters, next to names like ours."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(64, 16), nn.Linear(16, 64)
        self.layers = nn.ModuleDict({key: nn.Linear(16, 16) for key in KEYS})
        for name in ROOT:
            self.add_module(name, nn.Linear(16, 16))
        self.register_parameter("or", nn.Parameter(torch.randn(16, 16)))
        self.register_parameter("or_codes", nn.Parameter(torch.rand(16)))
        self.layers["in"].register_buffer("weight_scale", torch.rand(16))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for _ in range(2):
            for layer in [*self.layers.values(), *(getattr(self, name) for name in ROOT)]:
                x = x + torch.tanh(layer(x))
            x = x + nn.functional.linear(x, getattr(self, "or")) / 16 * self.or_codes
            x = x * self.layers["in"].weight_scale
        return self.head(x)


@pytest.fixture(scope="module")
def program() -> lq.Program:
    data = [IDS, IDS + 0]
    return lq.compile(Odd().eval(), IDS, scheme="w8a8", group_size=8, method="quarot", calibration=data)


def test_every_layer_is_found_under_the_name_of_the_model(program):
    sites = [site.name for site in program.graph_module.meta["loopq"].sites.values() if site.reason is None]
    assert set(sites) == {*(f"layers.{key}" for key in KEYS), *ROOT, "or"}
    assert "layers.in" in program.summary()
    with torch.no_grad():
        expected = Odd().eval()(IDS)
    assert float((program(IDS) - expected).norm() / expected.norm()) < 0.1, "no table took the place of another"


def test_a_printed_program_runs(program):
    scope = {"torch": torch, "operator": operator, "math": math, "inf": math.inf}
    exec(str(program), scope)
    with torch.no_grad():
        (found,) = scope["forward"](program.graph_module, IDS)
    assert torch.equal(found, program(IDS))


def test_a_saved_program_has_the_names_of_the_model(program, tmp_path):
    from safetensors import safe_open

    program.save(tmp_path)
    loaded = lq.load(tmp_path)
    assert torch.equal(loaded(IDS), program(IDS))
    assert loaded.summary() == program.summary()
    with safe_open(tmp_path / "tensors.safetensors", "pt") as file:
        assert {"layers.in.weight_codes", "layers.in.weight_scale", "layers.in.weight_1_scale", "layers.µ.bias"} <= set(
            file.keys()
        )
        assert not [name for name in file.keys() if "loopq_" in name.replace("loopq_in", "")]  # noqa: SIM118


@pytest.mark.parametrize("target", ["qdq", "onnxruntime"])
@pytest.mark.parametrize("form", ["unrolled", "rolled"])
def test_files_for_other_runtimes_have_the_names_of_the_model(program, tmp_path, form, target):
    report = program.export_onnx(tmp_path, form=form, target=target)
    found = torch.as_tensor(OnnxExecutable(report.path)(IDS))
    assert float((found - program(IDS)).norm() / found.norm()) < 0.05
    names = {value.name for value in onnx.load(report.path).graph.initializer}
    assert "graph.bias" in names
    assert not [name for name in names if "loopq_" in name.replace("loopq_in", "")]


def test_inspect_has_the_names_of_the_model(program, tmp_path):
    program.save(tmp_path)
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path), "--json"]).stdout
    weights = {site["weight"] for site in json.loads(shown)["sites"]}
    assert {"layers.in.weight", "graph.weight", "loopq_in.weight"} <= weights
    assert "layers.loopq_in" not in shown


def test_skip_takes_the_names_of_the_model():
    made = lq.compile(
        Odd().eval(), IDS, scheme="w8a8", group_size=8, method="symmetric", activation="dynamic", skip=("layers.in",)
    )
    assert made.graph_module.meta["loopq"].sites["layers.loopq_in.weight"].reason == "skip='layers.in'"


class InAndOut(nn.Module):
    """Causal attention that runs twice, between linears called `in` and `out`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(64, 32), nn.Linear(32, 64)
        self.add_module("in", nn.Linear(32, 96))
        self.add_module("out", nn.Linear(32, 32))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for _ in range(2):
            q, k, v = getattr(self, "in")(x).unsqueeze(1).chunk(3, -1)
            seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(seen.squeeze(1))
        return self.head(x)


def test_a_file_with_a_cache_has_the_names_of_the_model_and_serves_threads(tmp_path):
    made = lq.compile(InAndOut().eval(), IDS, scheme="w4a16", method="symmetric")
    report = made.export_onnx(tmp_path, target="onnxruntime", cache=True)
    text = report.path.read_bytes()
    assert b"loopq_in" not in text and b"in.weight" in text and b"out.weight" in text
    run, prompts = OnnxExecutable(report.path, threads=1), [(IDS[:1] + number) % 64 for number in range(8)]
    wrapped = made.as_hugging_face()

    def hugging_face(ids):
        return wrapped.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)

    for generate in (lambda ids: run.generate(ids, 6), lambda ids: run(ids)["logits"], hugging_face):
        expected = [generate(ids) for ids in prompts]
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(generate, prompts))
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


class Inputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, **named: Tensor) -> Tensor:
        return self.fc(sum(named.values()))


def test_inputs_may_have_any_name(tmp_path):
    torch.manual_seed(0)
    names = ["input", "device", "self_", "graph", "code", "inf"]
    inputs = {name: torch.randn(2, 5, 16) for name in names}
    model = Inputs().eval()
    made = lq.compile(model, inputs, scheme="w8a16", method="symmetric", activation="dynamic", group_size=8)
    with torch.no_grad():
        torch.testing.assert_close(made(**inputs), model(**inputs), rtol=0.05, atol=0.05)
    made.save(tmp_path / "p")
    assert torch.equal(lq.load(tmp_path / "p")(**inputs), made(**inputs))
    report = made.export_onnx(tmp_path / "onnx")
    assert [value.name for value in onnx.load(report.path).graph.input] == names
    scope = {"torch": torch}
    exec(str(made), scope)


@pytest.mark.parametrize("name", ["in", "lambda", "None", "a-b"])
def test_an_input_that_the_exporter_cannot_name_is_one_clear_error(name):
    with pytest.raises(lq.LoopQError, match=f"Input '{name}' .*rename"):
        lq.compile(Inputs().eval(), {name: torch.randn(2, 5, 16)}, scheme="w8a16", method="symmetric")


parts = st.text(st.sampled_from('ab-_x2d5f.Aµ²"in'), min_size=1, max_size=12)


@given(parts, parts)
def test_names_come_back_and_never_meet(left, right):
    for name in (left, right):
        assert shown_name(safe_name(name)) == name
        assert safe_name(shown_name(safe_name(name))) == safe_name(name)
    assert (safe_name(left) == safe_name(right)) == (left == right)
    assert safe_argument(left).isidentifier()
