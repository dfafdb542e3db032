"""Studies: cells that are measured once, and the tables and figures made of them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from loopq_compile.analysis import parameters, residual_error
from loopq_compile.bench import figures, study, sweeps, tables
from loopq_compile.bench.cells import Cells
from loopq_compile.bench.extrapolation import with_loops
from loopq_compile.bench.results import Report, spread
from loopq_compile.bench.settings import Run, Selection, Settings
from loopq_compile.bench.study import Study
from loopq_compile.calibration.states import loop_ends
from loopq_compile.calibration.training import Training
from loopq_compile.capture.to_graph import capture
from loopq_compile.errors import LoopQError
from loopq_compile.graph.scheme import Scheme
from loopq_compile.methods import reference_graph
from loopq_compile.models import repeat_layers
from loopq_compile.program import Program
from tests.cli_models import tiny_llama, tiny_ouro, tokenizer

TOKENS = torch.randint(1, 64, (200,), generator=torch.Generator().manual_seed(3))
STATIC, DYNAMIC = (Scheme.parse("w4a4", activation=kind) for kind in ("static", "dynamic"))
QUICK = Settings("tiny", "random tokens", "self", samples=4, sample_length=16, length=32, stride=16)


def make(folder: Path | None = None, model: Any = None, **options: Any) -> Study:
    cells = Cells(folder / "cells" if folder else None, **options)
    return Study(model or tiny_ouro(3), tokenizer(), TOKENS, QUICK, cells)


@pytest.fixture(scope="module")
def shared() -> Study:
    """A study whose cells stay in memory."""
    return make()


def test_cells_are_measured_once_per_setting(tmp_path: Path) -> None:
    asked = []

    def measure() -> dict[str, Any]:
        asked.append(1)
        return {"value": len(asked), "infinite": math.inf}

    for _ in range(2):
        assert Cells(tmp_path).get("a b", {"x": 1}, measure) == {"value": 1, "infinite": None}
    assert Cells(tmp_path).get("a b", {"x": 2}, measure)["value"] == 2
    assert Cells(tmp_path, fresh=True).get("a b", {"x": 2}, measure)["value"] == 3
    damaged = next(file for file in tmp_path.iterdir() if '"x": 1' in file.read_text())
    damaged.write_text('{"values": ')
    assert Cells(tmp_path).get("a b", {"x": 1}, measure)["value"] == 4
    assert len(list(tmp_path.iterdir())) == 2


def test_a_killed_run_goes_on_where_it_stood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    selection = Selection(["symmetric", "las"], [DYNAMIC])
    quantize = study.quantize
    started = []

    def dies_in_the_second(*arguments: Any) -> Program:
        started.append(arguments[2].name)
        if len(started) == 2:
            raise KeyboardInterrupt
        return quantize(*arguments)

    monkeypatch.setattr(study, "quantize", dies_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        tables.table1(make(tmp_path), selection)
    report = tables.table1(make(tmp_path), selection)
    assert started == ["symmetric", "las", "las"]
    assert [row[0] for row in report.rows] == ["full precision", "symmetric", "las"]
    monkeypatch.setattr(study, "capture", None)  # nothing is left to do
    assert tables.table1(make(tmp_path), selection).rows == report.rows


def test_a_calibration_killed_inside_a_cell_goes_on_from_its_checkpoint(tmp_path: Path, monkeypatch: Any) -> None:
    selection = Selection(["flatquant-e2e"], [DYNAMIC])
    taken: list[int] = []
    step = Training.step

    def counted(self: Training) -> Any:
        taken.append(1)
        if len(taken) == 6:
            raise KeyboardInterrupt
        return step(self)

    def run() -> Report:
        options = {"steps": 8, "checkpoint_every": 1, "batch_rows": 1}
        settings = replace(QUICK, options=options)
        return tables.table1(Study(tiny_ouro(2), tokenizer(), TOKENS, settings, Cells(tmp_path)), selection)

    monkeypatch.setattr(Training, "step", counted)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert list(tmp_path.glob("*.unfinished/*.safetensors"))
    run()
    assert len(taken) == 8 + 1, "only the step that was cut off ran again"
    assert not list(tmp_path.glob("*.unfinished"))


def test_other_models_texts_and_settings_have_other_cells(tmp_path: Path) -> None:
    run = Run("symmetric", DYNAMIC)
    first = make(tmp_path).measure(run)
    assert make(tmp_path, tiny_ouro(2)).measure(run)["perplexity"] != first["perplexity"]
    other = make(tmp_path)
    other.tokens = TOKENS.flip(0)
    assert other.measure(run)["perplexity"] != first["perplexity"]
    assert make(tmp_path).measure(Run("symmetric", STATIC))["kl"] != first["kl"]


def test_impossible_settings_become_rows(shared: Study) -> None:
    report = tables.table1(shared, Selection(["symmetric", "nonsense"], [DYNAMIC]))
    assert report.rows[1][-1] == "" and float(report.rows[1][3]) > 0
    assert "Unknown method 'nonsense'" in report.rows[2][-1] and report.rows[2][3] == ""


def test_seeds_are_summed_up(shared: Study) -> None:
    report = tables.table1(shared, Selection(["las"], [STATIC], [0, 1]))
    found = [shared.measure(Run("las", STATIC, seed))["perplexity"] for seed in (0, 1)]
    assert found[0] != found[1]
    deviation = abs(found[0] - found[1]) / 2**0.5
    assert report.rows[1][3] == f"{sum(found) / 2:.3f} ± {deviation:.3f}"
    assert len(report.data["runs"][0]["seeds"]) == 2


def test_spread() -> None:
    assert spread([2.0], ".1f") == "2.0"
    assert spread([1.0, 3.0], ".1f") == "2.0 ± 1.4"
    assert spread([1.0, None], ".1f") == "1.0 (1 x inf)"
    assert spread([None], ".1f") == "inf" and spread([], ".1f") == ""


def test_reports_are_written(tmp_path: Path, shared: Study) -> None:
    report = tables.table1(shared, Selection(["symmetric"], [DYNAMIC]))
    names = [path.name for path in report.write(tmp_path, model="tiny")]
    assert names[:2] == ["table1.json", "table1.md"]
    assert json.loads((tmp_path / "table1.json").read_text())["model"] == "tiny"
    assert "| symmetric | w4a4 | dynamic |" in (tmp_path / "table1.md").read_text()
    (tmp_path / "file").write_text("")
    with pytest.raises(LoopQError, match="Cannot write"):
        report.write(tmp_path / "file")


def reports(shared: Study) -> list[Report]:
    one = Selection(["symmetric", "las"], [DYNAMIC])
    return [
        tables.table1(shared, one),
        tables.table5(shared, one),
        figures.fig1(shared, one),
        figures.fig2(shared, one),
        sweeps.fig5(shared, Selection(["las"], [DYNAMIC], values=(2, 4))),
        sweeps.fig6(shared, Selection(["las"], [DYNAMIC], values=(2, 4))),
    ]


def test_every_report_has_a_picture(tmp_path: Path, shared: Study) -> None:
    pytest.importorskip("matplotlib")
    for report in reports(shared):
        assert (tmp_path / f"{report.name}.png") in report.write(tmp_path)
        assert (tmp_path / f"{report.name}.png").read_bytes().startswith(b"\x89PNG")


def test_ablations_ask_for_the_parts_of_loopq(shared: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def loopq(**flags: bool) -> Any:
        asked.append(flags)
        if flags.get("cta") is False:
            raise TypeError("no flag cta")
        return study.get_pipeline("symmetric")

    monkeypatch.setitem(study.METHODS, "loopq", loopq)
    report = tables.table2(shared, Selection(["loopq"], [DYNAMIC]))
    labels = [row[0] for row in report.rows[1:]]
    assert labels == list(tables.ABLATIONS)
    assert {"slt": False} in asked and {} in asked
    assert "cta=False" in report.rows[1 + labels.index("without CTA")][-1]
    assert report.rows[1 + labels.index("without SLT")][-1] == ""


def test_weight_solvers_are_compared_without_and_behind_transforms() -> None:
    quick = Study(tiny_ouro(3), tokenizer(), TOKENS, replace(QUICK, options={"steps": 5}))
    report = tables.solvers(quick, Selection(["symmetric", "loopq"], [Scheme.parse("w4a8", activation="dynamic")]))
    perplexity = {row[0]: row[3] for row in report.rows[1:]}
    assert list(perplexity) == [
        *("rtn", "gptq", "loaq", "rtn behind transforms", "gptq behind transforms", "loaq behind transforms"),
        *("loopq without transforms", "loopq"),
    ]
    assert not [row[-1] for row in report.rows[1:] if row[-1]]
    assert len(set(perplexity.values())) == len(perplexity), "two rows are the same program"


def test_errors_along_the_trajectory_start_at_zero(shared: Study) -> None:
    values = shared.measure(Run("las", DYNAMIC))["trajectory"]
    states = [point for point in values if point["kind"] == "state"]
    assert states[0]["error"] == 0 and states[0]["loop"] is None
    assert [point["loop"] for point in states] == sorted(
        (point["loop"] for point in states), key=lambda loop: -1 if loop is None else loop
    )
    assert all(0 < point["error"] < 1 for point in states[2:])
    assert sum(point["site"].endswith("down_proj") for point in values if point["kind"] == "linear") == 3


def test_a_program_without_quantization_has_no_error() -> None:
    captured = capture(tiny_ouro(3))
    reference = reference_graph(captured, DYNAMIC)
    where = residual_error.points(reference)
    found = residual_error.errors(reference, captured, where, [TOKENS[:32].view(2, 16)])
    assert len(found) == len(where) and max(found.values()) == 0


def test_the_residual_stream_is_found() -> None:
    reference = reference_graph(capture(repeat_layers(tiny_llama(layers=3), 1, 1, 2)), DYNAMIC)
    states = [point for point in residual_error.points(reference) if point.kind == "state"]
    adds = [point for point in states if point.node.startswith("add")]
    assert len(adds) == 2 * 4
    assert [point.loop for point in adds] == [None, None, 0, 0, 1, 1, None, None]


def test_ranges_by_loop(shared: Study) -> None:
    report = figures.fig1(shared, Selection(["symmetric"], [DYNAMIC]))
    ranges = report.data["ranges"]
    assert len(ranges) == 4 and all(len(values) == 3 for values in ranges.values())
    for values in report.data["normalised"].values():
        assert sum(values) == pytest.approx(3)
    inputs: list[Tensor] = []
    model: nn.Module = shared.model
    hook = model.model.layers[0].mlp.down_proj.register_forward_hook(lambda _, x, y: inputs.append(x[0]))  # type: ignore[union-attr,union-attr,index]
    with torch.no_grad():
        model(torch.cat(shared.batches()))
    hook.remove()
    name = next(group for group in ranges if group.endswith("down_proj"))
    for x, value in zip(inputs, ranges[name], strict=True):
        assert value == pytest.approx(float(x.abs().flatten().kthvalue(math.ceil(0.99 * x.numel())).values), rel=0.08)


def test_models_without_loops_have_no_figure_one() -> None:
    plain, selection = make(model=tiny_llama()), Selection(["symmetric"], [DYNAMIC])
    for figure in (figures.fig1, sweeps.fig5):
        with pytest.raises(LoopQError, match="no loop"):
            figure(plain, selection)


def test_parameters_by_part(shared: Study) -> None:
    found = {name: shared.measure(Run(name, DYNAMIC))["parameters"] for name in ("symmetric", "las")}
    model = sum(parameter.numel() for parameter in shared.model.parameters())
    parts = found["las"]["parts"]
    weights = sum(p.numel() for name, p in shared.model.named_parameters() if "_proj" in name)
    assert parts[parameters.WEIGHTS]["count"] == weights
    assert parts[parameters.WEIGHTS]["stored"] == weights / 2
    assert parts[parameters.SCALES]["count"] == weights / 32
    assert parts[parameters.FLOAT]["count"] == pytest.approx(model - weights, abs=32)
    groups_of_32 = 1 + 1 + 1 + 2  # attention in and out, MLP in, and out, which is twice as wide
    assert parts[parameters.LOOP]["count"] == 3 * groups_of_32
    assert found["las"]["share"] == pytest.approx(100 * 3 * groups_of_32 / found["las"]["model"]["count"])
    assert found["symmetric"]["parts"][parameters.LOOP]["count"] == 0


def graph_and_ends(model: nn.Module) -> tuple[fx.GraphModule, list[str]]:
    reference = reference_graph(capture(model), DYNAMIC)
    return reference, loop_ends(reference)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_other_numbers_of_loops_are_those_of_the_model(count: int) -> None:
    graph, ends = graph_and_ends(tiny_ouro(3))
    ids = TOKENS[:20].view(2, 10)
    with torch.no_grad():
        expected = tiny_ouro(count)(ids).logits
    torch.testing.assert_close(Program(with_loops(graph, ends, count))(ids).logits, expected, rtol=1e-4, atol=1e-5)
    if count == 3:
        assert with_loops(graph, ends, 3).code == graph.code


def test_layers_in_the_middle_can_run_more_often() -> None:
    graph, ends = graph_and_ends(repeat_layers(tiny_llama(layers=4), 1, 2, 2))
    ids = TOKENS[:20].view(2, 10)
    with torch.no_grad():
        expected = repeat_layers(tiny_llama(layers=4), 1, 2, 4)(input_ids=ids, use_cache=False).logits
    made = Program(with_loops(graph, ends, 4))(input_ids=ids).logits
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)


def test_loops_with_a_longer_memory_cannot_be_made_longer() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.block, self.head = nn.Embedding(64, 32), nn.Linear(32, 32), nn.Linear(32, 64)

        def forward(self, ids: Tensor) -> Tensor:
            x = older = self.embed(ids)
            for _ in range(4):
                x, older = torch.tanh(self.block(x)) + older, x
            return self.head(x)

    reference = reference_graph(capture(Skip(), TOKENS[:20].view(2, 10)), DYNAMIC)
    adds = [node.name for node in reference.graph.nodes if node.name.startswith("add")]
    with pytest.raises(LoopQError, match="single state"):
        with_loops(reference, adds, 5)
    with pytest.raises(LoopQError, match="once or more"):
        with_loops(reference, adds, 0)


def test_extrapolation_of_programs(shared: Study) -> None:
    report = sweeps.fig5(shared, Selection(["las"], [DYNAMIC], values=(3, 4)))
    own = shared.measure(Run("las", DYNAMIC))
    row = report.rows[1]
    assert row[0] == "las w4a4 dynamic" and float(row[1]) == pytest.approx(own["perplexity"], abs=1e-3)
    assert row[2] != row[1]


def test_the_budget_is_in_steps_tokens_and_minutes(shared: Study) -> None:
    report = sweeps.budget(shared, Selection(["loopq-plain", "las"], [DYNAMIC], values=(1, 3)))
    learned, other = report.rows[:2], report.rows[2:]
    assert [row[1] for row in report.rows] == ["1", "3", "1", "3"]
    tokens = [int(row[2].replace(",", "")) for row in learned]
    assert tokens[1] == 3 * tokens[0] > 0 and all(float(row[3]) >= 0 and float(row[6]) > 0 for row in learned)
    assert all(row[2] == "0" for row in other), "las learns nothing"
    with pytest.raises(LoopQError, match="0 steps"):
        sweeps.budget(shared, Selection(["las"], [STATIC], values=(0, 4)))


def test_sweeps_vary_one_thing(shared: Study) -> None:
    report = sweeps.fig6(shared, Selection(["las"], [STATIC], values=(2, 4)))
    assert [row[1] for row in report.rows] == ["", "2", "4"]
    assert report.rows[1][2] != report.rows[2][2]
    with pytest.raises(LoopQError, match="0 samples"):
        sweeps.fig6(shared, Selection(["las"], [STATIC], values=(0, 4)))
    with pytest.raises(LoopQError, match="4 groups"):
        sweeps.fig4(shared, Selection(["loopq"], [DYNAMIC], values=(5,)))
