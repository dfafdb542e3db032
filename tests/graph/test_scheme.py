"""Schemes by name and by field."""

import pytest

import loopq_compile as lq
from loopq_compile.graph.scheme import quantized_range


@pytest.mark.parametrize("weights", range(2, 9))
@pytest.mark.parametrize("activations", [*range(2, 9), 16])
def test_every_width_has_a_name(weights, activations):
    scheme = lq.Scheme.parse(f"w{weights}a{activations}")
    assert (scheme.weight_bits, scheme.activation_bits) == (weights, activations)
    assert scheme.name == f"w{weights}a{activations}"
    assert scheme.quantizes_activations == (activations < 16)


def test_ranges_are_symmetric_twos_complement():
    assert quantized_range(4) == (-8, 7)
    assert quantized_range(8) == (-128, 127)


def test_fields_can_be_changed_when_parsing():
    assert lq.Scheme.parse("w4a8", group_size=64).group_size == 64


@pytest.mark.parametrize("name", ["w4", "w1a4", "w4a9", "w9a4", "int4", "", "w4a4b"])
def test_unknown_names_are_refused(name):
    with pytest.raises(lq.LoopQError):
        lq.Scheme.parse(name)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"weight_bits": 4.0}, "weight_bits"),
        ({"weight_bits": True}, "weight_bits"),
        ({"group_size": 0}, "group_size"),
        ({"group_size": "32"}, "group_size"),
        ({"activation": "dynamical"}, "Did you mean 'dynamic'"),
        ({"activation_range": "mean"}, "activation_range"),
        ({"percentile": 120}, "percentile"),
        ({"skip": "lm_head"}, "('lm_head',)"),
        ({"grup_size": 32}, "Did you mean 'group_size'"),
    ],
)
def test_bad_fields_are_refused_with_advice(fields, says):
    with pytest.raises(lq.LoopQError, match=says.replace("(", r"\(").replace(")", r"\)")):
        lq.Scheme.parse("w4a4", **fields)
