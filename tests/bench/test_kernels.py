"""`bench kernels`: static figures, and everything around timing, with a timer that needs no GPU."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from loopq_compile.backends.triton import ahead, configurations
from loopq_compile.backends.triton.configurations import Tile
from loopq_compile.bench import kernel_times
from loopq_compile.bench.cells import Cells
from loopq_compile.bench.kernel_choice import choose, resident
from loopq_compile.bench.kernels import DEVICES, estimate, estimate_stream, estimates
from loopq_compile.cli import app
from loopq_compile.errors import LoopQError
from loopq_compile.operators import ops
from tests.tiny import tiny_program

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


def test_estimates_of_other_kernels_follow_from_bytes():
    """One token of 2,048 numbers: read in bfloat16, written in 4 bits with float32 scales, and two small factors."""
    found = estimate_stream("norm, transform, quantize", 1, A100)
    moved = 2 * 2048 + 2048 / 2 + 4 * 64 + 4 * (32**2 + 64**2)
    assert found.bound_by == "memory" and found.microseconds == pytest.approx(moved / 2039e3)
    attention = estimate_stream("attention, 2,048 tokens in 8 bits", 16, A100)
    assert 1.8 < attention.bf16_microseconds / attention.microseconds < 2  # half the bytes, and scales
    assert {x.rows for x in estimates() if x.product.startswith("attention, ")} == {1, 16}


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
    assert {path.stem for path in tmp_path.glob("*.json")} == {"kernels", "kernels-estimate", "results_manifest"}


def test_a_spilling_kernel_fails_the_command(monkeypatch):
    monkeypatch.setattr(ahead, "default_cases", lambda *sizes: [ahead.linear_case("large", ahead.Tile(128, 128, 4, 3))])
    done = run("--static", "--sm", "86")
    assert done.exit_code == 1 and "spills" in done.output


def test_timing_without_a_gpu_says_what_there_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments in ([], ["--tune"], ["--json"]):
        done = run(*arguments)
        assert done.exit_code == 1 and "needs an NVIDIA GPU" in done.stderr and "--static" in done.stderr
    assert "go with --static" in run("--sm", "80").stderr


def test_larger_groups_are_compiled_and_estimated():
    done = run("--static", "--only", "prefill w4a4", "--sm", "80,90", "--group-size", "128", "--json")
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)["data"]["estimates"]["rows"]
    rows = [x for x in rows if x["rows"] == 4096 and x["product"] == "MLP out"]
    long = {x["device"]: x["bf16_microseconds"] / x["microseconds"] for x in rows}
    assert (
        long["H100 SXM"]
        > 1.4
        > 0.8
        > estimate("qkv", 4096, DEVICES[1]).bf16_microseconds / estimate("qkv", 4096, DEVICES[1]).microseconds
    )
    assert "groups of 32, 64, 128" in run("--static", "--group-size", "16").stderr


def test_fewer_groups_are_less_to_scale():
    times = [estimate("qkv", 4096, A100, group_size=size) for size in (-1, 128, 64, 32)]
    assert times[0].bound_by == "tensor cores" and times[-1].bound_by == "float32"
    assert times[0].microseconds <= times[1].microseconds < times[2].microseconds < times[3].microseconds


class Clock:
    """A timer that runs its function and counts; the n-th time is n milliseconds."""

    def __init__(self):
        self.calls = 0

    def __call__(self, function):
        function()
        self.calls += 1
        return float(self.calls)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(kernel_times, "PRODUCTS", {"small": (96, 128)})


def timed(folder, clock, **options):
    options = {"runs": kernel_times.candidates(ops.packed_linear.default), "rows": (1, 32)} | options
    return kernel_times.time_products(
        "Some GPU", Cells(folder), products=["small"], timer=clock, device="cpu", **options
    )


def test_the_table_compares_with_bfloat16_and_says_what_is_missing(tmp_path, small, monkeypatch):
    monkeypatch.setattr(kernel_times.importlib.util, "find_spec", lambda name: None)
    report = timed(tmp_path, Clock())
    lines = {(row[1], row[2]): row for row in report.rows}
    assert lines["1", "bfloat16 (cuBLAS)"][3:] == ("1000.0", "1.00", "")
    assert lines["1", "w4a4"][3:] == ("2000.0", "0.50", "") and lines["1", "w4a8"][4] == "0.33"
    assert lines["1", "torch._int_mm (w8a8)"][3:] == ("", "", "takes more than 16 rows")
    assert (
        lines["32", "torch._int_mm (w8a8)"][5] == "" and lines["32", "torchao w4a16"][5] == "torchao is not installed"
    )
    assert "Some GPU" in report.to_markdown() and json.loads(report.to_json())["data"]["gpu"] == "Some GPU"


def test_a_run_that_was_cut_off_goes_on(tmp_path, small):
    first = Clock()
    timed(tmp_path, first, rows=(1,))
    again = Clock()
    timed(tmp_path, again, rows=(1, 32))
    assert first.calls >= 3 and again.calls <= first.calls + 1
    other = Clock()
    timed(tmp_path, other, rows=(1,), group_size=64)
    assert other.calls == first.calls, "another group size is another measurement"


def test_a_wrong_kernel_is_not_timed(tmp_path, small):
    clock = Clock()
    runs = kernel_times.candidates(lambda *arguments: ops.packed_linear(*arguments) * 1.1)[1:2]
    with pytest.raises(LoopQError, match=r"wrong for w4a4 on \[1, 128\].*not timed"):
        timed(tmp_path, clock, runs=runs)
    assert clock.calls == 0


def test_what_others_raise_is_a_note(tmp_path, small):
    def broken(problem):
        raise RuntimeError("no kernel image\nmore")

    report = timed(tmp_path, Clock(), runs=[kernel_times.Candidate("other", broken)])
    assert {row[5] for row in report.rows} == {"RuntimeError: no kernel image"}


def test_tuning_keeps_the_fastest_tile_and_lowering_reads_it(tmp_path, small, monkeypatch):
    monkeypatch.setenv("LOOPQ_COMPILE_TILES", str(tmp_path / "tiles.json"))
    configurations.tables.cache_clear()
    good = {True: Tile(16, 32, 2, 5), False: Tile(64, 128, 8, 2)}

    def timer(function):
        function()
        tile = configurations.linear_tile(64, 64, 4)
        if tile.warps == 4 and tile.rows > 16:
            raise RuntimeError("out of resource: shared memory")
        return 1.0 if replace(tile, split=1) in good.values() else 2.0

    product = ops.packed_linear.default
    found = kernel_times.tune(90, timer=timer, device="cpu", product=product)
    assert found == {"90": {"decode": good[True], "middle": good[False], "prefill": good[False]}}
    before = configurations.linear_tile(512, 2048, 64, 90)
    configurations.write_table(configurations.user_table(), found, "measured on Some GPU")
    assert configurations.linear_tile(512, 2048, 64, 90) == good[False] != before
    assert configurations.linear_tile(512, 2048, 64, 80) != good[False]
    assert (
        configurations.linear_tile(1, 2048, 64, 90).columns == 32
        and configurations.linear_tile(1, 2048, 64, 90).split > 1
    )
    wide = kernel_times.tune(90, group_size=64, timer=Clock(), device="cpu", product=product)
    configurations.write_table(configurations.user_table(), wide, "for other groups")
    assert configurations.linear_tile(512, 2048, 32, 90, 64) == wide["90/64"]["prefill"] != good[False]
    assert configurations.linear_tile(512, 2048, 64, 90) == good[False], "those for groups of 32 stay"
    assert configurations.linear_tile(512, 2048, 16, 90, 128) == good[False], "where nothing was tuned, those for 32"
    configurations.write_table(configurations.user_table(), {"80": found["90"]}, "and another")
    assert set(configurations.read_table(configurations.user_table())) == {"80", "90", "90/64"}
    configurations.tables.cache_clear()


@pytest.mark.parametrize("content", ["{", "[]", '{"tiles": {"90": {"decode": {"rows": 3}}}}', '{"tiles": {"90": 1}}'])
def test_a_damaged_table_is_named_and_left_out(tmp_path, monkeypatch, content):
    file = tmp_path / "tiles.json"
    file.write_text(content)
    monkeypatch.setenv("LOOPQ_COMPILE_TILES", str(file))
    configurations.tables.cache_clear()
    with pytest.warns(UserWarning, match=r"tiles\.json holds no tiles.*delete it or tune again"):
        assert configurations.linear_tile(4096, 64, 2, 90).rows >= 64
    configurations.tables.cache_clear()


def test_the_table_of_the_package_has_tiles_of_the_grid():
    shipped = configurations.read_table(Path(configurations.__file__).with_name("tiles.json"))
    assert set(shipped) == {str(number) for number in ahead.ARCHITECTURES}
    for tiles in shipped.values():
        assert set(tiles) == set(configurations.KINDS)
        assert tiles["decode"] in [replace(tile, split=1) for tile in configurations.tuning_grid(True)]
        assert {tiles["middle"], tiles["prefill"]} <= set(configurations.tuning_grid(False))


def made(architecture=90, registers=128, shared=8192, warps=4, **options):
    return ahead.Compiled(
        "", architecture, registers, options.pop("spilled", 0), shared, ("mma.s8.s8",), "s8", warps, **options
    )


@pytest.mark.parametrize(
    ("compiled", "programs"),
    [
        (made(registers=128, warps=4), 4),
        (made(registers=121, warps=4), 4),
        (made(registers=32, shared=0, warps=8), 8),
        (made(registers=32, shared=0, warps=8, architecture=120), 6),
        (made(registers=32, shared=49 * 1024), 4),
        (made(registers=255, warps=16), 0),
    ],
)
def test_programs_of_a_multiprocessor(compiled, programs):
    """Limited by registers (in eighths), shared memory, and warps."""
    assert resident(compiled) == programs


def test_tiles_are_chosen_by_reuse_where_latency_is_hidden_and_never_broken_ones():
    small, large, spilling, broken = Tile(64, 64, 4, 3), Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3)
    narrow, wide = Tile(16, 32, 4, 5, 4), Tile(16, 128, 4, 5, 4)
    found = choose(
        [
            (small, made()),
            (large, made(registers=230, warps=8)),
            (spilling, made(spilled=8)),
            (broken, made(failure="PassManager::run failed")),
            (narrow, made(registers=64)),
            (wide, made(registers=64)),
        ]
    )
    assert found == {"90": {"prefill": large, "middle": small, "decode": replace(wide, split=1)}}


def test_what_the_compiler_cannot_do_is_reported(monkeypatch):
    monkeypatch.setattr(
        ahead.triton, "compile", lambda *args, **options: (_ for _ in ()).throw(RuntimeError("no\nway"))
    )
    found = ahead.compile_case(ahead.adapter_case(), 90)
    assert found.problems == ["does not compile: no"]


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_tokens_per_second_of_a_program(kv_bits):
    """The step runs far more often than the cache has room for tokens, as with timers."""

    def often(step):
        for _ in range(12):
            step()
        return 1.0

    options = {"kv_bits": kv_bits, "timer": often, "fallback": True, "cuda_graph": False}
    found = kernel_times.time_decoding(tiny_program(), batch=2, context=5, **options)
    assert found == {"batch": 2, "context": 5, "kv_bits": kv_bits, "ms": 1.0, "tokens_per_second": 2000.0}
    table = kernel_times.decoding_report("Some GPU", "tiny", [found]).to_markdown()
    assert "2000" in table and ("8 bits" if kv_bits else "floating point") in table
