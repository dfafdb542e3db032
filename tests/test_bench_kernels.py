"""`bench kernels --static`."""

import json

import pytest
from typer.testing import CliRunner

from loopq_compile.backends.triton import ahead
from loopq_compile.bench.kernels import DEVICES, estimate, estimates
from loopq_compile.cli import app

A100 = DEVICES[0]


def run(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["bench", "kernels", *arguments])


def test_one_row_is_bound_by_memory_and_many_by_arithmetic():
    one, many = estimate("qkv", 1, A100), estimate("qkv", 4096, A100)
    assert one.bound_by == "memory" and many.bound_by != "memory"
    # 6144 x 2048 weights of half a byte, and a float32 scale for each 32: 7.9 MB at 2039 GB/s.
    assert one.microseconds == pytest.approx(6144 * (1024 + 256) / 2.039e6, rel=0.01)
    assert many.microseconds == pytest.approx(3 * 4096 * 6144 * 64 / 9.75e6, rel=1e-6)


def test_estimates_grow_with_rows():
    found = {(x.product, x.device, x.rows): x.microseconds for x in estimates()}
    for product, device, rows in found:
        if rows > 1:
            assert found[product, device, rows] >= found[product, device, 1]


def test_json_has_resources_and_marked_estimates():
    done = run("--static", "--only", "decode w4a4", "--sm", "80,90", "--json")
    assert done.exit_code == 0, done.output
    content = json.loads(done.stdout)
    assert [line["architecture"] for line in content["data"]["compiled"]] == [80, 90]
    assert all(line["spilled"] == 0 and ".s8.s8" in line["instructions"][0] for line in content["data"]["compiled"])
    assert content["data"]["estimates"]["estimate"] is True


def test_the_table_says_that_it_is_an_estimate(tmp_path):
    done = run("--static", "--only", "decode sum", "--sm", "120", "--out", str(tmp_path))
    assert done.exit_code == 0, done.output
    assert "decode sum" in done.output and "ESTIMATE" in done.output and "RTX 5090" in done.output
    assert {path.name for path in tmp_path.glob("*.json")} == {"kernels.json", "kernels-estimate.json"}


def test_a_spilling_kernel_fails_the_command(monkeypatch):
    monkeypatch.setattr(ahead, "default_cases", lambda: [ahead.linear_case("large", ahead.Tile(128, 128, 4, 3))])
    done = run("--static", "--sm", "86")
    assert done.exit_code == 1 and "spills" in done.output


def test_without_static_the_command_says_what_there_is():
    done = run()
    assert done.exit_code != 0 and "--static" in str(done.output) + str(done.exception)
