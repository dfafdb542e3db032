"""`python -m tests.gpu` without a GPU: parts that run anywhere, and parts that fail or come too late."""

import json

import pytest

from tests.gpu.__main__ import PARTS, main


def report(tmp_path, *arguments):
    status = main([*arguments, "--out", str(tmp_path / "found.json")])
    return status, json.loads((tmp_path / "found.json").read_text())


def test_quick_parts_run_on_the_cpu(tmp_path):
    status, found = report(tmp_path, "static decoding", "products", "--device", "cpu", "--quick")
    assert status == 0 and found["passed"], found
    assert [(part["name"], part["state"]) for part in found["parts"]] == [
        ("static decoding", "passed"),
        ("products", "passed"),
    ]
    assert found["card"] == "none (cpu)" and found["versions"]["torch"] != "missing"
    decoding, products = (part["figures"] for part in found["parts"])
    assert set(decoding) == {"float bits, unrolled", "8 bits, rolled"}
    assert {line["runs"] for line in products["rows"]} == {"bfloat16 (cuBLAS)", "w4a4"}


def test_a_part_that_fails_or_comes_too_late_does_not_stop_the_others(tmp_path, capsys):
    status, found = report(tmp_path, "saved", "products", "--device", "cpu", "--quick", "--seconds", "0.1")
    assert status == 1 and not found["passed"]
    first, second = found["parts"]
    assert first["state"] == "failed" and "ended after" in first["error"]
    assert second["state"] == "not run" and "time was over" in second["error"]
    assert "not run" in capsys.readouterr().out


@pytest.mark.nightly
def test_all_quick_parts_run_on_the_cpu(tmp_path):
    status, found = report(tmp_path, "--device", "cpu", "--quick")
    assert status == 0 and len(found["parts"]) == len(PARTS), found


def test_an_unknown_part_is_refused(tmp_path):
    with pytest.raises(SystemExit):
        report(tmp_path, "speed")
