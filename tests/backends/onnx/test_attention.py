"""Attention in target `onnxruntime` is one node, and the file's results stay the same."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest

from loopq_compile.backends.onnx import attention, export
from tests.decoding import VOCABULARY, captured


def results(path, past: int, new: int) -> dict[str, np.ndarray]:  # type: ignore[no-untyped-def]
    """All results on random caches, one row padded on the left far into the new tokens."""
    rng = np.random.default_rng(0)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    mask = np.ones((2, past + new), dtype=np.int64)
    mask[1, : past + new - 1] = 0
    feed = {"input_ids": rng.integers(0, VOCABULARY, (2, new)), "attention_mask": mask, "loops": np.array(3)}
    for given in session.get_inputs():
        if given.name not in feed:
            sizes = [{"batch": 2, "past": past, "loops": 3}.get(size, size) for size in given.shape]
            feed[given.name] = rng.normal(size=sizes).astype(np.float32)
    names = [given.name for given in session.get_inputs()]
    return dict(
        zip(
            [value.name for value in session.get_outputs()],
            session.run(None, {name: feed[name] for name in names}),
            strict=True,
        )
    )


def attentions(path) -> list[onnx.NodeProto]:  # type: ignore[no-untyped-def]
    graph = onnx.load(path).graph
    bodies = [node.attribute[0].g for node in graph.node if node.op_type == "Loop"]
    return [node for part in (graph, *bodies) for node in part.node if node.op_type == "Attention"]


def shape(node: onnx.NodeProto) -> tuple[int, int] | None:
    """Heads of queries and of keys, if they are adjacent in memory."""
    given = {attribute.name: attribute.i for attribute in node.attribute}
    return (given["q_num_heads"], given["kv_num_heads"]) if "q_num_heads" in given else None


def test_attention_on_an_integer_cache_keeps_its_shape(tmp_path) -> None:
    """Keys and values are dequantized `[batch, heads, total, size]`: heads are not adjacent in memory."""
    graph_module = captured("ouro-mask")[1].graph_module
    fused = export(graph_module, tmp_path, target="onnxruntime", cache=True, kv_bits=8)
    assert {shape(node) for node in attentions(fused.path)} == {None}


@pytest.mark.parametrize("form", ["unrolled", "rolled"])
def test_every_row_of_every_result_is_what_it_was(form: str, tmp_path) -> None:
    graph_module = captured("ouro-mask")[1].graph_module
    fused = export(graph_module, tmp_path / "fused", target="onnxruntime", cache=True, form=form)
    assert fused.nodes["Attention"] == (6 if form == "unrolled" else 2)  # two layers, three times
    assert "Softmax" not in fused.nodes
    assert fused.opset == attention.OPSET
    # Heads are adjacent, as products return them; if a loop joins caches itself, they have another shape.
    assert {shape(node) for node in attentions(fused.path)} == {(4, 2) if form == "unrolled" else None}
    options = {"target": "onnxruntime", "cache": True, "form": form, "skip": ("fuse-attention",)}
    plain = export(graph_module, tmp_path / "plain", **options)
    assert "Attention" not in plain.nodes
    assert plain.opset < attention.OPSET
    for past, new in ((37, 1), (11, 5), (0, 6)):
        given, expected = (results(file.path, past, new) for file in (fused, plain))
        for name, values in expected.items():
            np.testing.assert_allclose(given[name], values, rtol=1e-4, atol=1e-5, err_msg=name)
