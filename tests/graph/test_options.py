"""Options of calibration: what is accepted, and how a wrong value is refused."""

import json
from pathlib import Path

import pytest
from torch import nn

import loopq_compile as lq
from loopq_compile.graph.options import CalibrationOptions
from tests.tiny import tokens


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", 0, "steps must be an integer of at least 1; got 0"),
        ("steps", 2.5, "steps must be an integer"),
        ("steps", True, "steps must be an integer"),
        ("batch_rows", 0, "batch_rows must be an integer of at least 1"),
        ("transition_rank", -1, "transition_rank must be"),
        ("refresh", 0, "refresh must be"),
        ("evaluate_every", 0, "evaluate_every must be"),
        ("checkpoint_every", 0, "checkpoint_every must be"),
        ("patience", 0, "patience must be"),
        ("seed", -1, "seed must be an integer of at least 0"),
        ("seed", 2**63, "seed must be .* at most 9223372036854775807"),
        ("top_k", 0, "top_k must be"),
        ("learning_rate", 0, "learning_rate must be a number above 0; got 0"),
        ("learning_rate", "fast", "learning_rate must be a number"),
        ("learning_rate", float("nan"), "learning_rate must be a number"),
        ("temperature", float("inf"), "temperature must be a number"),
        ("gradient_clip", -1.0, "gradient_clip must be"),
        ("state_weight", -0.1, "state_weight must be a number at least 0"),
        ("transition_weight", None, "transition_weight must be"),
        ("final_share", 1.5, "at most 1; got 1.5"),
        ("selection_budget", -0.1, "selection_budget must be"),
        ("validation", 2, "validation must be"),
        ("weight_solver", "gtpq", "Did you mean 'gptq'"),
        ("precision", "float16", "Known: bfloat16, float32"),
        ("recompute", "always", "Known: auto, off, on"),
    ],
)
def test_a_wrong_value_is_refused_by_name(field, value, message):
    with pytest.raises(lq.LoopQError, match=message) as error:
        CalibrationOptions(**{field: value})
    assert field in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", None),
        ("top_k", None),
        ("weight_solver", None),
        ("weight_solver", "loaq"),
        ("selection_budget", 0),
        ("selection_budget", 1),
        ("state_weight", 0.0),
        ("validation", 0.0),
        ("seed", 0),
    ],
)
def test_values_at_the_bounds_are_accepted(field, value):
    assert getattr(CalibrationOptions(**{field: value}), field) == value


def test_options_are_plain_values():
    options = CalibrationOptions(checkpoint=Path("folder"), steps=7)
    assert options.checkpoint == "folder"
    assert CalibrationOptions(**json.loads(json.dumps(options.to_dict()))) == options
    assert set(options.to_dict()) == CalibrationOptions.names()


def test_compile_takes_options_of_scheme_and_calibration_and_knows_no_others():
    model = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 32)).eval()
    program = lq.compile(model, tokens(), scheme="w8a8", method="symmetric", group_size=16, steps=3)
    assert program(tokens()).shape == (2, 16, 32)
    with pytest.raises(lq.LoopQError, match=r"compile has no option 'stepps'. Did you mean 'steps'"):
        lq.compile(model, tokens(), method="symmetric", stepps=3)
    with pytest.raises(lq.LoopQError, match="steps must be an integer"):
        lq.compile(model, tokens(), method="symmetric", steps=-3)
