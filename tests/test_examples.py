"""Every example runs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


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


def test_looped_smollm2() -> None:
    pytest.importorskip("transformers")
    example = load("looped_smollm2")
    program = example.main(["--layers", "1-2", "--times", "3"])
    assert program.loops.count == 3
    with pytest.raises(SystemExit, match="0-3"):
        example.main(["--layers", "3-4"])
