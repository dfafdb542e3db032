"""`get_backend` and the reference backend."""

from __future__ import annotations

import importlib.metadata
import types

import pytest
import torch
from torch import nn

from loopq_compile import backends
from loopq_compile.capture.to_graph import capture
from loopq_compile.errors import LoopQError


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> dict[str, torch.Tensor]:
        return {"y": self.linear(x) * scale}


def test_reference_runs_the_graph_like_the_model() -> None:
    model = Model()
    run = backends.get_backend("reference").lower(capture(model, (torch.randn(2, 3, 4),)))
    x = torch.randn(5, 3, 4)
    assert torch.equal(run(x)["y"], model(x)["y"])
    assert not run(x)["y"].requires_grad
    with pytest.raises(LoopQError, match="missing"):
        run()


def test_reference_has_no_options() -> None:
    with pytest.raises(LoopQError, match="threads"):
        backends.get_backend("reference").lower(capture(Model(), (torch.randn(2, 3, 4),)), threads=2)


@pytest.mark.parametrize(
    ("name", "message"),
    [("onxn", "Did you mean 'onnx'"), ("tritom", "Did you mean 'triton'"), (None, "Unknown backend")],
)
def test_names_that_are_refused(name, message) -> None:
    with pytest.raises(LoopQError, match=message):
        backends.get_backend(name)


def test_a_backend_from_an_entry_point(monkeypatch) -> None:
    class Point:
        name = "mine"

        def load(self):
            return types.SimpleNamespace(lower=lambda program: "lowered")

    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: [Point()] if group == backends.ENTRY_POINTS else []
    )
    assert "mine" in backends.backend_names()
    assert backends.get_backend("mine").lower(None) == "lowered"


def test_a_backend_whose_dependency_is_missing(monkeypatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("No module named 'onnxscript'")

    monkeypatch.setattr(backends.importlib, "import_module", broken)
    with pytest.raises(LoopQError, match="onnxscript"):
        backends.get_backend("onnx")
