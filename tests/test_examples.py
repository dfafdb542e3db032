"""Every example runs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def _beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples import `tiny_model` from their own folder, as they do when they are run."""
    monkeypatch.syspath_prepend(str(EXAMPLES))


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_quantize_your_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load("quantize_your_model").main(["--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "3 x (blocks, norm)" in printed
    assert (tmp_path / "out" / "onnx" / "model.onnx").is_file()
    assert (tmp_path / "out" / "program" / "program.json").is_file()
    assert float(printed.rsplit(":", 1)[1]) < 1e-2  # a code that rounds the other way moves logits


def test_custom_pass(capsys: pytest.CaptureFixture[str]) -> None:
    counts = load("custom_pass").main([])
    assert counts == {"loop=0": 8, "loop=1": 8, "loop=2": 8, "outside": 1}
    assert "loop=2: 8 matrix products" in capsys.readouterr().out


def test_the_pass_in_the_guide(capsys: pytest.CaptureFixture[str]) -> None:
    from tests.tiny import tiny_model, tokens

    text = (EXAMPLES / "README.md").read_text(encoding="utf-8").split("## Write a pass")[1]
    code = text.split("```python\n")[1].split("```")[0]
    exec(code, {"model": tiny_model(), "x": tokens(), "batches": [tokens(1)]})
    promised = code.split("  # ")[-1].split(" for a model")[0]
    assert capsys.readouterr().out.strip() == promised


def test_looped_smollm2() -> None:
    example = load("looped_smollm2")
    program = example.main(["--layers", "1-2", "--times", "3"])
    assert program.loops.count == 3
    with pytest.raises(SystemExit, match="0-3"):
        example.main(["--layers", "3-4"])


def test_retrofit_smollm2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stopped and started again, to a folder that loads as the original architecture with other layers 1 and 2."""
    from loopq_compile.sources.loading import load_model

    example, out = (
        load("retrofit_smollm2"),
        ["--out", str(tmp_path / "out"), "--steps", "20", "--learning-rate", "1e-3"],
    )
    assert len(example.main([*out, "--minutes", "0"])) == 1
    losses = example.main(out)
    assert len(losses) == 20 and losses[-1] < 0.95 * losses[0]
    assert capsys.readouterr().out.splitlines()[-1].endswith("after 20 steps")
    original, learned = example.load(None), load_model(str(tmp_path / "out")).model
    assert learned.config.num_hidden_layers == 4
    same = [
        all(map(torch.equal, a.parameters(), b.parameters()))
        for a, b in zip(original.model.layers, learned.model.layers, strict=True)
    ]
    assert same == [True, False, False, True]


def test_train_recurrent(tmp_path: Path) -> None:
    """The folder loads with its code, and the compiler finds the layers that run three times."""
    import loopq_compile as lq
    from loopq_compile import bundled
    from loopq_compile.sources.loading import load_model

    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    bundled.load_tokenizer().save(str(work / "tokenizer.json"))
    np.save(work / "train.npy", np.random.default_rng(0).integers(0, 64, 4096).astype(np.uint16))
    sizes = ["--width", "32", "--length", "32", "--steps", "10", "--learning-rate", "1e-2"]
    losses = load("train_recurrent").main(["--work", str(work), "--out", str(out), *sizes])
    assert losses[-1] < losses[0] - 0.5
    model = load_model(str(out), trust_remote_code=True).model
    program = lq.compile(model, scheme="w6a16", method="symmetric")
    assert program.loops.describe() == "3 x (layers.4, layers.5, layers.6)"


def test_custom_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    from loopq_compile import backends

    monkeypatch.setattr(backends, "_registered", {})
    assert load("custom_backend").main([]) < 1e-5


def test_mixed_precision() -> None:
    four, first, eight = load("mixed_precision").main([]).values()
    assert eight < first < four


def test_keep_layer_8bit(tmp_path: Path) -> None:
    import loopq_compile as lq

    example = load("keep_layer_8bit")
    four, kept = example.main(["--out", str(tmp_path / "p")]).values()
    assert kept < four
    program = lq.load(tmp_path / "p")
    bits = {
        node.meta["loopq_site"]: node.meta["loopq_bits"]
        for node in program.graph_module.graph.nodes
        if node.meta.get("loopq_bits") and "down_proj" in str(node.args[0])
    }
    assert bits == {"model.layers.0.mlp.down_proj": 8}
    integers = program.export_onnx(tmp_path / "onnx").integer_weights
    assert integers["INT8"] == 1 and integers["INT4"] == 6
    with pytest.raises(lq.LoopQError, match="No quantized linear matches"):
        example.main(["--layer", "nothing", "--out", str(tmp_path / "p")])


def test_plot_ranges(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    ranges = load("plot_ranges").main(["--out", str(tmp_path / "ranges.png")])
    assert (tmp_path / "ranges.png").stat().st_size > 1000
    assert ranges and all(len(rows) == 3 and min(rows) > 0 for rows in ranges.values())
