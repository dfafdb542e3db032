"""The content of an exported file, and how it gets there."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from loopq_compile.backends.onnx import OnnxExecutable, export, exporter, write
from loopq_compile.errors import InternalError, LoopQError
from tests.backends.onnx.graphs import Recurrent, captured, quantized, tokens
from tests.permissions import as_somebody_else


@pytest.fixture(scope="module")
def program():
    return quantized(captured(Recurrent(bias=True)), activation="static")


@pytest.fixture(scope="module")
def report(program, tmp_path_factory):
    return export(program, tmp_path_factory.mktemp("onnx"))


@pytest.fixture(scope="module")
def file(report):
    return report.path


@pytest.fixture(scope="module")
def graph(file):
    return onnx.load(file).graph


def test_weights_are_stored_once_and_turned_round(graph) -> None:
    shapes = {i.name: (i.data_type, list(i.dims)) for i in graph.initializer}
    assert shapes["up.weight_codes.int4"] == (onnx.TensorProto.INT4, [48, 96])
    assert shapes["up.weight_scale.blocks"] == (onnx.TensorProto.FLOAT, [3, 96])
    large = [
        i for i in graph.initializer if i.data_type == onnx.TensorProto.FLOAT and len(i.dims) == 2 and max(i.dims) > 70
    ]
    assert [i.name for i in large if "scale" not in i.name] == ["embed.weight"], "the tied head reads the embedding"
    reader = [node for node in graph.node if "up.weight_codes.int4" in node.input]
    assert [node.op_type for node in reader] == ["DequantizeLinear"]
    shaped = [node for node in graph.node if reader[0].output[0] in node.input]
    assert [node.op_type for node in shaped] == ["Reshape"], "what keeps runtimes from fusing the weight"
    assert sum(shaped[0].output[0] in node.input for node in graph.node) == 2, "both loops read one dequantized weight"


def test_integers_flow_between_quantize_and_dequantize(graph) -> None:
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    codes = [node.output[0] for node in graph.node if node.op_type == "QuantizeLinear"]
    assert len(codes) == 4
    assert {types[name] for name in codes} == {onnx.TensorProto.INT4}


def test_nodes_and_scales_tell_their_loop(graph) -> None:
    products = [node for node in graph.node if node.op_type == "MatMul"]
    assert [node.name for node in products][:3] == ["/loop0/up/MatMul", "/loop0/down/MatMul", "/loop1/up/MatMul"]
    assert {p.key: p.value for p in products[2].metadata_props} == {
        "loopq.loop": "1", "loopq.site": "up", "loopq.node": "linear_2",
    }  # fmt: skip
    assert {"up.weight_table_loop0", "up.weight_table_loop1"} <= {i.name for i in graph.initializer}


def test_dynamic_axes_and_names(graph) -> None:
    axes = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.input, *graph.output)]
    assert axes == [["batch", "sequence"], ["batch", "sequence", 80]]
    assert [value.name for value in (*graph.input, *graph.output)] == ["input_ids", "output_0"]


def test_nothing_of_this_machine_is_in_the_file(file) -> None:
    content = file.read_bytes()
    for trace in (b".py", b"/tmp", b"site-packages", os.getcwd().encode(), b"pkg.torch", b"stack_trace"):
        assert trace not in content


def test_metadata_describes_the_program(file) -> None:
    run = OnnxExecutable(file, threads=1)
    assert run.program_info["loops"] == 2
    assert json.loads(run.metadata["loopq.signature"])["signature"]["inputs"][0][2] == ["batch", "sequence"]


def test_report(report) -> None:
    assert report.bytes == report.path.stat().st_size
    assert report.opset == 21
    assert report.nodes["QuantizeLinear"] == 4
    assert "2 INT4" in str(report)
    assert "batch, sequence, 80" in str(report)


def test_external_data_above_the_threshold(program, tmp_path) -> None:
    report = export(program, tmp_path, external_data_threshold=1000)
    assert [file.name for file in report.files] == ["model.onnx", "model.onnx.data"]
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data", "onnx_manifest.json"}
    assert report.bytes == sum(file.stat().st_size for file in tmp_path.iterdir() if file.suffix != ".json")
    x = tokens(2, 5)
    assert torch.allclose(OnnxExecutable(tmp_path, threads=1)(x), program(x)[0], rtol=1e-3, atol=1e-3)
    export(program, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", "onnx_manifest.json"}, "no stale weights"


def test_overwrite_is_a_choice(program, tmp_path) -> None:
    (tmp_path / "model.onnx").write_text("mine")
    with pytest.raises(LoopQError, match="overwrite=True"):
        export(program, tmp_path, overwrite=False)
    assert (tmp_path / "model.onnx").read_text() == "mine"


@pytest.mark.parametrize("fails", ["save", "check", "rename"])
def test_a_failed_write_leaves_nothing(fails: str, file, tmp_path, monkeypatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    model = ir.load(file)
    target = {"save": (write.ir, "save"), "check": (write, "_check"), "rename": (Path, "rename")}[fails]
    monkeypatch.setattr(*target, full)
    with pytest.raises(LoopQError, match="No space left"):
        write.write_model(model, tmp_path / "new" / "folder", threshold=10**9)
    assert not (tmp_path / "new").exists()


def test_a_failed_write_keeps_the_older_file(file, tmp_path, monkeypatch) -> None:
    (tmp_path / "model.onnx").write_text("older")
    model = ir.load(file)
    model.graph.node(0).op_type = "NoSuchOperator"
    with pytest.raises(InternalError, match="NoSuchOperator"):
        write.write_model(model, tmp_path, threshold=10**9)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("model.onnx", "older")]


def test_a_file_in_place_of_the_directory(program, tmp_path) -> None:
    (tmp_path / "taken").write_text("")
    for directory in (tmp_path / "taken", tmp_path / "taken" / "below"):
        with pytest.raises(LoopQError, match="is a file"):
            export(program, directory)


def test_a_directory_without_permission(program, tmp_path) -> None:
    tmp_path.chmod(0o500)
    with as_somebody_else(), pytest.raises(LoopQError, match=r"[Pp]ermission"):
        export(program, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "onxruntime"}, "Did you mean 'onnxruntime'"),
        ({"target": "qqd"}, "Did you mean 'qdq'"),
        ({"form": "unroled"}, "Did you mean"),
        ({"cache": True}, "no attention"),
    ],
)
def test_options_that_are_refused(options, message, program, tmp_path) -> None:
    with pytest.raises(LoopQError, match=message):
        export(program, tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_not_a_graph_and_not_a_path(program, tmp_path) -> None:
    with pytest.raises(LoopQError, match="graph module"):
        export("program", tmp_path)  # type: ignore[arg-type]
    with pytest.raises(LoopQError, match="path"):
        export(program, None)  # type: ignore[arg-type]


def test_an_operator_without_translation_is_named(tmp_path) -> None:
    class Odd(Recurrent):
        def forward(self, input_ids):
            return torch.special.bessel_j0(super().forward(input_ids))

    with pytest.raises(LoopQError, match=r"special_bessel_j0.*test_file\.py"):
        export(captured(Odd()), tmp_path)


@torch.library.custom_op("loopq_tests::twist", mutates_args=())
def twist(x: Tensor) -> Tensor:
    return x * 2


twist.register_fake(torch.empty_like)


class Twisted(Recurrent):
    """Calls an operator that torch.onnx decomposes, then one that it does not know."""

    def forward(self, ids: Tensor) -> Tensor:
        return twist(torch.special.log_ndtr(super().forward(ids)))


def test_the_operator_that_is_named_has_no_decomposition_either(tmp_path) -> None:
    with pytest.raises(LoopQError, match=r"loopq_tests.twist.default .*has no ONNX translation.*return twist"):
        export(captured(Twisted(loops=1)), tmp_path)


def test_float64_is_refused(tmp_path) -> None:
    with pytest.raises(LoopQError, match="float64"):
        export(quantized(captured(Recurrent().double())), tmp_path)


def test_targets_of_this_version() -> None:
    assert exporter.TARGETS == ("qdq", "onnxruntime")
    assert exporter.FORMS == ("unrolled", "rolled")
