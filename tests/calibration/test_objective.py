"""The loss, against numbers from its formula."""

import math

import pytest
import torch

from loopq_compile.calibration.objective import (
    Objective,
    Targets,
    distance,
    divergence,
    keep_largest,
    token_mean,
)
from loopq_compile.graph.options import CalibrationOptions


def logits(seed=0, vocabulary=20, shape=(2, 3)):
    return torch.randn(*shape, vocabulary, generator=torch.Generator().manual_seed(seed)) * 2


def targets_of(teacher, options, states=(), mask=None):
    return Targets(*keep_largest(teacher, options), [], list(states), mask)


def test_the_whole_divergence_is_that_of_pytorch():
    teacher, student = logits(), logits(1)
    options = CalibrationOptions()
    got = divergence(student, targets_of(teacher, options), 1.0)
    expected = torch.nn.functional.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="none").sum(-1)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert divergence(teacher, targets_of(teacher, options), 1.0).abs().max() < 1e-6


@pytest.mark.parametrize("k", [1, 3, 10, 19])
def test_the_divergence_of_the_largest_is_a_lower_bound(k):
    teacher, student = logits(), logits(1)
    whole = divergence(student, targets_of(teacher, CalibrationOptions()), 1.0)
    targets = targets_of(teacher, CalibrationOptions(top_k=k))
    assert targets.logits.shape[-1] == k
    part = divergence(student, targets, 1.0)
    assert (part <= whole + 1e-5).all() and (part >= -1e-6).all()
    assert divergence(teacher, targets, 1.0).abs().max() < 1e-5, "zero for the teacher itself"


def test_the_bound_is_reached_where_the_rest_is_in_proportion():
    """Equality: teacher and student have the same conditional distribution over the tokens outside the top-k."""
    teacher = logits()
    student = teacher.clone()
    largest = teacher.topk(4, dim=-1).indices
    student.scatter_add_(-1, largest, logits(1, 4))
    whole = divergence(student, targets_of(teacher, CalibrationOptions()), 1.0)
    part = divergence(student, targets_of(teacher, CalibrationOptions(top_k=4)), 1.0)
    torch.testing.assert_close(part, whole, rtol=1e-3, atol=1e-5)
    assert whole.min() > 1e-3


def test_the_temperature_divides_the_logits_of_both():
    teacher, student = logits(), logits(1)
    options = CalibrationOptions(temperature=2.0)
    warm = divergence(student, targets_of(teacher, options), 2.0)
    plain = divergence(student / 2, targets_of(teacher / 2, CalibrationOptions()), 1.0)
    torch.testing.assert_close(warm, plain)


def test_the_terms_by_hand():
    """Two loops, one token, two features; everything below can be checked on paper."""
    teacher, student = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[0.0, math.log(3.0)]]])
    h2, h3 = torch.tensor([[[1.0, 1.0]]]), torch.tensor([[[2.0, 0.0]]])
    u1, u2 = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[2.0, 1.0]]])
    handed_on = torch.tensor([[[1.0, 1.5]]])
    options = CalibrationOptions(state_weight=0.1, transition_weight=0.2, final_share=1.0)
    targets = targets_of(teacher, options, [h2, h3])
    objective = Objective(options, 2)
    objective.update_shares([u1, u2], targets)
    # |h2 - h3|² / mean(h3²) = 1 / 2; |h2 - u1|² = 0.5 / 1; |h3 - u2|² = 0.5 / 2. Roots: 0.7071, 0.7071, 0.5.
    share = math.sqrt(0.5) / (math.sqrt(0.5) + math.sqrt(0.5) + 0.5 + 1e-6)
    torch.testing.assert_close(objective.final_shares, torch.tensor([share, 0.0]))
    parts = objective(student, [], [u1, u2], [handed_on], targets)
    prediction = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    # Loop 1: (1 - a) |u1 - h2|² + a |u1 - h3|² with 0.5 and (1 + 4) / 2 / 2 = 1.25; loop 2: |u2 - h3|² = 0.25.
    trajectory = ((1 - share) * 0.5 + share * 1.25 + 0.25) / 2
    transition = 0.125
    assert float(parts.prediction) == pytest.approx(prediction, abs=1e-6)
    assert float(parts.trajectory) == pytest.approx(trajectory, rel=1e-5)
    assert float(parts.transition) == pytest.approx(transition, rel=1e-5)
    assert float(parts.total) == pytest.approx(prediction + 0.1 * trajectory + 0.2 * transition, rel=1e-5)


def test_a_perfect_student_is_pulled_to_the_end_no_further_than_allowed():
    states = [logits(seed, 8) for seed in range(3)]
    for bound in (1.0, 0.5, 0.0):
        objective = Objective(CalibrationOptions(final_share=bound), 3)
        objective.update_shares(states, targets_of(logits(), CalibrationOptions(), states))
        expected = torch.tensor([bound, bound, 0.0])
        torch.testing.assert_close(objective.final_shares, expected, rtol=1e-4, atol=1e-4)


def test_the_shares_are_constants_for_the_gradient():
    states = [logits(seed, 8).requires_grad_() for seed in range(2)]
    objective = Objective(CalibrationOptions(), 2)
    objective.update_shares(states, targets_of(logits(), CalibrationOptions(), [logits(5, 8), logits(6, 8)]))
    assert not objective.final_shares.requires_grad


def test_weights_of_zero_switch_terms_off():
    options = CalibrationOptions(state_weight=0.0, transition_weight=0.0)
    states = [logits(seed, 8) for seed in range(2)]
    parts = Objective(options, 2)(logits(1), [], states, states[:1], targets_of(logits(), options, states[::-1]))
    assert float(parts.trajectory) == float(parts.transition) == 0.0
    assert parts.total.equal(parts.prediction)


def test_distances_do_not_depend_on_the_scale_of_the_model():
    x, y = logits(0, 8), logits(1, 8)
    torch.testing.assert_close(distance(x * 100, y * 100, None), distance(x, y, None))
    torch.testing.assert_close(distance(x, y, None), (x - y).square().mean() / y.square().mean())


def test_masked_tokens_do_not_count():
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    teacher, student = logits(), logits(1)
    spoiled_teacher, spoiled_student = teacher.clone(), student.clone()
    spoiled_teacher[mask == 0], spoiled_student[mask == 0] = 50 * logits(7, 20, (3,)), 50 * logits(8, 20, (3,))
    torch.testing.assert_close(distance(spoiled_student, spoiled_teacher, mask), distance(student, teacher, mask))
    options = CalibrationOptions()
    kept = divergence(student, targets_of(teacher, options), 1.0)
    spoiled = divergence(spoiled_student, targets_of(spoiled_teacher, options), 1.0)
    torch.testing.assert_close(token_mean(spoiled, mask), token_mean(kept, mask))
    torch.testing.assert_close(token_mean(kept, mask), kept[mask == 1].mean())


def test_without_a_vocabulary_outputs_are_compared():
    outputs, wanted = [logits(0, 8), logits(1, 4)], [logits(2, 8), logits(3, 4)]
    parts = Objective(CalibrationOptions(), 0)(None, outputs, [], [], Targets(None, None, None, wanted, []))
    expected = sum(float((x - y).square().mean() / y.square().mean()) for x, y in zip(outputs, wanted, strict=True)) / 2
    assert float(parts.total) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [None, 1, 4])
def test_the_gradient_of_the_divergence_is_that_of_its_formula(k, temperature):
    options = CalibrationOptions(top_k=k, temperature=temperature)
    targets = targets_of(logits(), options)
    student = logits(1).requires_grad_()
    upstream = torch.rand(2, 3, generator=torch.Generator().manual_seed(2))
    got = torch.autograd.grad(divergence(student, targets, temperature), student, upstream)
    log_q, log_p = (student / temperature).log_softmax(-1), (logits() / temperature).log_softmax(-1)
    if k is not None:
        log_p, log_q = log_p.gather(-1, targets.indices.long()), log_q.gather(-1, targets.indices.long())
    p, q = log_p.exp(), log_q.exp()
    loss = (p * (log_p - log_q)).sum(-1)
    if k is not None:
        loss = loss + (1 - p.sum(-1)) * ((1 - p.sum(-1)).log() - (1 - q.sum(-1)).log())
    expected = torch.autograd.grad(loss, student, upstream)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
