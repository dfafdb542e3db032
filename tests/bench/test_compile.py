"""`bench compile`: the cost of passes by number of layer calls, and helpers that must not read the whole graph."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from typer.testing import CliRunner

from loopq_compile.bench.compile import exponent
from loopq_compile.cli import app
from loopq_compile.errors import InternalError
from loopq_compile.graph.insert import call, inserting


def test_the_command_lists_every_step(tmp_path: Path) -> None:
    options = ["--values", "1x2,1x4", "--method", "quarot", "--json", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, ["bench", "compile", *options])
    assert result.exit_code == 0, result.output
    data = {row["step"]: row for row in json.loads(result.stdout)["data"]}
    steps = list(data)
    assert steps[0] == "capture" and steps[-2:] == ["roll-loops", "garbage collection"]
    assert {"tag-loops", "insert-transforms", "insert-activation-qdq", "pack-weights", "save", "load"} <= set(steps)
    assert all(row["calls"] == [2, 4] and len(row["seconds"]) == 2 for row in data.values())
    inside = sum(data[step]["seconds"][1] for step in steps[1 : steps.index("all passes and shapes")])
    assert 0 < inside < data["all passes and shapes"]["seconds"][1]
    assert "| capture |" in (tmp_path / "compile.md").read_text()


@pytest.mark.parametrize("values", ["4", "0x4", "4x4,", "ax4", ","])
def test_sizes_are_layers_by_loops(values: str) -> None:
    result = CliRunner().invoke(app, ["bench", "compile", "--values", values, "--scheme", "no"])
    assert result.exit_code == 1
    assert ("--values" in result.stderr) == (values != "4x4,")


def test_the_exponent_is_that_of_the_last_two_sizes() -> None:
    assert exponent((16, 64, 256), (9.0, 1.0, 4.0)) == pytest.approx(1)
    assert exponent((64, 256), (1.0, 16.0)) == pytest.approx(2)
    assert exponent((64, 256), (0.001, 0.09)) is None
    assert exponent((64,), (1.0,)) is None


def chain(length: int) -> fx.Graph:
    """Applies `relu` this many times."""
    graph = fx.Graph()
    node = graph.placeholder("x")
    for _ in range(length):
        node = graph.call_function(torch.ops.aten.relu.default, (node,))
    graph.output(node)
    return graph


def test_a_block_of_new_nodes_costs_the_same_in_large_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in nodes read; there are a thousand."""
    graph = chain(1000)
    nodes = list(graph.nodes)
    looked_at: list[fx.Node] = []
    kind = type(graph.nodes)
    original = kind.__iter__

    def counting(self: Any) -> Iterator[fx.Node]:
        for node in original(self):
            looked_at.append(node)
            yield node

    with monkeypatch.context() as patch:
        patch.setattr(kind, "__iter__", counting)
        with inserting(graph, before=nodes[500], tag=None, site="here") as made:
            new = call(graph, torch.ops.aten.neg.default, nodes[499])
    assert made == [new] and new.meta["loopq_site"] == "here" and new.next is nodes[500]
    assert 0 < len(looked_at) < 10


def test_nodes_made_elsewhere_are_noticed() -> None:
    graph = chain(10)
    nodes = list(graph.nodes)
    with (
        pytest.raises(InternalError, match="created elsewhere"),
        inserting(graph, before=nodes[5], tag=None),
        graph.inserting_before(nodes[8]),
    ):
        call(graph, torch.ops.aten.neg.default, nodes[2])
