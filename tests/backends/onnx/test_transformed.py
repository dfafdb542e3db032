"""Programs that have a cache, rolled loops or early exit before they are exported."""

from __future__ import annotations

import onnx
import pytest
import torch

import loopq_compile as lq
from loopq_compile.backends.onnx import OnnxExecutable, export
from loopq_compile.errors import LoopQError
from tests.backends.onnx.graphs import Recurrent, tokens
from tests.decoding import captured, ids


@pytest.fixture(scope="module")
def program() -> lq.Program:
    return captured("ouro-mask")[1]


class Tied(Recurrent):
    """Embeddings are the head."""

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return {"logits": super().forward(input_ids)}


def structure(path) -> list[tuple[str, ...]]:  # type: ignore[no-untyped-def]
    return [(node.op_type, *node.input, *node.output) for node in onnx.load(path).graph.node]


@pytest.mark.parametrize(
    ("transform", "options"),
    [
        (lambda p: p.with_cache(last_token=True), {"cache": True, "last_token": True}),
        (lambda p: p.with_cache(stacked=True, kv_bits=8).rolled(), {"cache": True, "kv_bits": 8, "form": "rolled"}),
        (lambda p: p.with_early_exit(), {"early_exit": True, "form": "rolled"}),
    ],
    ids=["cache", "rolled", "early exit"],
)
def test_the_same_file(transform, options: dict, program, tmp_path) -> None:  # type: ignore[no-untyped-def]
    asked = program.export_onnx(tmp_path / "asked", target="onnxruntime", **options)
    given = transform(program).export_onnx(tmp_path / "given", target="onnxruntime")
    assert given.form == asked.form and given.inputs == asked.inputs and given.outputs == asked.outputs
    assert structure(given.path) == structure(asked.path)


def test_rolled_programs_give_the_same_results(program) -> None:
    rolled = program.rolled()
    assert len(rolled.graph_module.graph.nodes) < len(program.graph_module.graph.nodes)
    mask = torch.ones_like(ids())
    given, expected = (torch.utils._pytree.tree_leaves(run(ids(), mask)) for run in (rolled, program))
    assert all(torch.equal(*pair) for pair in zip(given, expected, strict=True))
    assert len(rolled.rolled().graph_module.graph.nodes) == len(rolled.graph_module.graph.nodes)


def test_contradictions_are_refused(program, tmp_path) -> None:
    with pytest.raises(LoopQError, match="already"):
        export(program.with_cache().graph_module, tmp_path, cache=True, kv_bits=8)
    with pytest.raises(LoopQError, match="stacked=True"):
        program.with_cache().rolled()
    with pytest.raises(LoopQError, match="stacked=True"):
        export(program.rolled().graph_module, tmp_path, cache=True)
    with pytest.raises(LoopQError, match="unrolled"):
        export(program.rolled().graph_module, tmp_path, target="onnxruntime", products="both")


@pytest.mark.parametrize("bits", [8, 4])
def test_tied_embeddings_and_head_are_one_table(bits: int, tmp_path) -> None:
    """Looked-up rows are those that the head multiplies with; no float table is left."""
    program = lq.compile(Tied(width=64).eval(), tokens(2, 9), scheme="w4a8", method="symmetric")
    report = program.export_onnx(tmp_path, target="onnxruntime", head_bits=bits)
    model = onnx.load(report.path)
    (lookup,) = [node for node in model.graph.node if node.op_type == "GatherBlockQuantized"]
    (head,) = [node for node in model.graph.node if node.output[0] == "logits"]
    assert lookup.input[0] == head.input[1]
    assert not [t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and 80 * 64 in t.dims]
    largest = max((len(t.raw_data) for t in model.graph.initializer if "embed" in t.name), default=0)
    assert largest == 80 * 64 * bits // 8
    logits, plain = (run(tokens(2, 9))["logits"] for run in (OnnxExecutable(report.path, threads=1), program))
    assert (logits - plain).abs().mean() < (0.02 if bits == 8 else 0.3) * plain.abs().mean()
