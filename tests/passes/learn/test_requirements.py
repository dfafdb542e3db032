"""What the formula asks for, and what is refused before it starts."""

from dataclasses import replace

import pytest
import torch

import loopq_compile as lq
from loopq_compile import compiler
from loopq_compile.capture.to_graph import capture
from loopq_compile.graph.options import CalibrationOptions
from loopq_compile.methods import reference_graph
from loopq_compile.passes.learn.requirements import Work, check_fits
from tests.tiny import tiny_model, tokens

OPTIONS = CalibrationOptions()


@pytest.fixture(scope="module")
def work() -> Work:
    graph = reference_graph(capture(tiny_model(), tokens()), lq.Scheme.parse("w4a4"))
    return Work.of(graph, [[torch.zeros(8, 32, dtype=torch.long)]], OPTIONS)


def test_the_work_is_counted(work):
    program = lq.compile(tiny_model(), tokens(), scheme="w4a16", method="symmetric")
    sites = [site for site in lq.graph.state.get_state(program.graph_module).sites.values() if site.reason is None]
    assert work.weights == sum(site.shape[0] * site.shape[1] for site in sites)
    assert work.calls == program.loops.count and work.tokens == 4 * 32 and not work.recomputes(OPTIONS)
    assert work.logits == 4 * work.tokens * work.outputs


def test_every_kind_of_learning_counts_once(work):
    phases = work.phases(lq.pipelines.loopq(), OPTIONS)
    assert list(phases) == ["transforms", "selection", "solver", "rounding"]
    assert not work.phases(lq.pipelines.las(), OPTIONS)
    assert "selection" not in work.phases(lq.pipelines.loopq(), replace(OPTIONS, selection_budget=0.0))
    assert set(work.phases(lq.pipelines.symmetric(), replace(OPTIONS, weight_solver="gptq"))) == {"solver"}


def test_a_model_of_published_size_takes_what_the_measured_slopes_say(work):
    large = replace(work, weights=1_200_000_000, largest=2048 * 5632, nodes=6000, widest=5632, large=True)
    needed = max(large.phases(lq.pipelines.loopq(), OPTIONS).values())
    assert 5 * large.weights < needed < 7 * large.weights, "5.2 (rounding) to 6.8 (solver) bytes from 2 to 4 layers"


def test_what_does_not_fit_is_refused_with_what_would(work):
    passes = list(lq.pipelines.flatquant_e2e())
    big = replace(work, values=40e9, logits=20e9, tokens=4096, length=1024)
    needed = max(big.phases(passes, OPTIONS).values())
    assert check_fits(big, passes, OPTIONS, needed) is None
    warning = check_fits(big, passes, OPTIONS, round(needed * 0.9))
    assert warning is not None and "GiB are available" in warning
    with pytest.raises(lq.LoopQError, match="It would fit with recompute='on' and batch_rows=1"):
        check_fits(big, passes, OPTIONS, 30 << 30)
    with pytest.raises(lq.LoopQError, match="a machine with more memory"):
        check_fits(big, passes, OPTIONS, 1 << 20)


def test_compile_refuses_before_it_starts(monkeypatch):
    monkeypatch.setattr(compiler, "LARGE", 0)
    monkeypatch.setattr(compiler, "available_memory", lambda device: 1 << 20)
    monkeypatch.setattr("loopq_compile.passes.learn.calibrate.Calibrate.call", lambda *_: pytest.fail("it started"))
    with pytest.raises(lq.LoopQError, match=r"needs about .* GiB beyond the model"):
        lq.compile(tiny_model(), tokens(), calibration=[tokens()], steps=2)
