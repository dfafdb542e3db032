"""`bench speculate`."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from loopq_compile.bench.speculate import break_even, costs, rates, spread_prompts
from loopq_compile.cli import app
from loopq_compile.errors import LoopQError
from tests.decoding import captured, ids


def test_rates_and_costs() -> None:
    program = captured("tiny")[1]
    report = rates(program, [ids(1, 8), ids(1, 8, 1)], ["lookup", "loops:1"], 12)
    assert [x["runs"] for x in report.data] == ["plain", "lookup", "loops:1"]
    assert all(x["same"] == x["texts"] == 2 and x["rate"] > 0 for x in report.data)
    assert report.data[2]["tokens_per_step"] >= 1 >= report.data[2]["acceptance"] >= 0
    calls = costs(program, ids(1, 8), [1], repeats=1).data
    assert [x["call"].split(" ")[0] for x in calls] == ["plain", "read", "read", "read", "1", "1", "1", "1"]
    assert all(x["ms"] > 0 and x["steps"] > 0 for x in calls)


def test_break_even() -> None:
    assert break_even(lambda a: 1 + a, 1.25) == pytest.approx(0.25)
    assert break_even(lambda a: 1 + a, 2.5) is None


def test_prompts_are_spread() -> None:
    assert [int(p[0, 0]) for p in spread_prompts(torch.arange(100), 3, 20)] == [0, 40, 80]
    with pytest.raises(LoopQError, match="a prompt needs 20"):
        spread_prompts(torch.arange(10), 3, 20)


def test_the_command() -> None:
    small = ["--prompts", "1", "--new-tokens", "6", "--scheme", "float32", "--methods", "auto", "--json"]
    result = CliRunner().invoke(app, ["bench", "speculate", "bundled", *small])
    assert result.exit_code == 0, result.output
    assert [x["runs"] for x in json.loads(result.stdout)["data"]] == ["plain", "auto"]
