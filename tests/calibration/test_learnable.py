"""Coordinates of what is learned, and the optimizer."""

import pytest
import torch

from loopq_compile.calibration.learnable import RATES, Learnable, Optimizer


def positive(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.05


@pytest.mark.parametrize("kind", sorted(set(RATES) - {"rounding"}))
def test_coordinates_keep_the_value(kind):
    tensor = positive(4, 8)
    item = Learnable.of("x", kind, tensor)
    torch.testing.assert_close(item.value(), tensor, rtol=1e-4, atol=1e-6)
    assert item.raw.is_leaf and item.raw.requires_grad
    item.value().sum().backward()
    assert item.gradient is not None and item.gradient.abs().min() > 0


@pytest.mark.parametrize("kind", ["range", "diagonal", "clip", "weight_clip"])
def test_no_step_leaves_what_is_allowed(kind):
    item = Learnable.of("x", kind, positive(8))
    for raw in (torch.full((8,), 30.0), torch.full((8,), -30.0)):
        value = item.value(raw)
        assert (value > 0).all()
        if kind == "clip":
            assert (value <= 1).all()


def test_clip_ratios_of_one_can_still_learn():
    item = Learnable.of("x", "clip", torch.ones(3))
    item.value().sum().backward()
    assert item.raw.grad.min() > 1e-3


def test_latent_weights_move_by_the_sign_of_their_gradient_on_average():
    start = torch.full((1024, 512), 100, dtype=torch.int16)
    item = Learnable.of("x", "rounding", start, fraction=11)
    optimizer = Optimizer([item], 0.01, 40)
    units = 0.0
    for _ in range(40):
        item.coordinates.add_gradient(torch.tensor([1.0, -1.0] * 256).expand(1024, 512))
        units += 0.01 * RATES["rounding"] * optimizer.factor * 2048
        optimizer.step()
        assert item.gradient is None
    assert 1 < units < 40 * 0.1, "far less than a unit in a step"
    moved = item.raw.float() - start.float()
    assert float(moved[:, ::2].mean()) == pytest.approx(-units, rel=0.1)
    assert float(moved[:, 1::2].mean()) == pytest.approx(units, rel=0.1)
    assert (start == 100).all(), "the graph's own table stays"


def test_latent_weights_stop_at_the_ends_of_their_range():
    ends = torch.tensor([[-32768, 32767]], dtype=torch.int16)
    item = Learnable.of("x", "rounding", ends, fraction=11)
    item.coordinates.add_gradient(torch.tensor([[1.0, -1.0]]))
    Optimizer([item], 1.0, 1).step()
    assert item.raw.equal(ends)


def rotation_problem(steps=60, size=6):
    torch.manual_seed(0)
    target = torch.linalg.qr(torch.randn(size, size)).Q
    target[:, 0] *= torch.linalg.det(target).sign()
    item = Learnable.of("r", "orthogonal", torch.eye(size).unsqueeze(0))
    optimizer = Optimizer([item], 1.0, steps)
    losses = []
    for _ in range(steps):
        loss = (item.value()[0] - target).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return item, losses


def test_rotations_stay_rotations_and_learn():
    item, losses = rotation_problem()
    eye = torch.eye(6)
    assert (item.raw[0].detach() @ item.raw[0].detach().t() - eye).abs().max() < 1e-4
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("kind", ["transform", "orthogonal"])
def test_the_optimizer_goes_on_from_its_state(kind):
    """Six steps are three steps, a state, and three steps."""

    def steps(item, optimizer, numbers):
        for number in numbers:
            weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(number))
            (item.value() * weight).sum().backward()
            optimizer.step()

    def fresh(tensor):
        item = Learnable.of("x", kind, tensor)
        return item, Optimizer([item], 1.0, 6)

    whole, optimizer = fresh(torch.eye(4).unsqueeze(0))
    steps(whole, optimizer, range(6))
    first, optimizer = fresh(torch.eye(4).unsqueeze(0))
    steps(first, optimizer, range(3))
    second, resumed = fresh(first.raw)
    resumed.restore({name: tensor.clone() for name, tensor in optimizer.state().items()})
    steps(second, resumed, range(3, 6))
    assert second.raw.equal(whole.raw)


def test_the_schedule_rises_and_falls():
    item = Learnable.of("x", "transform", torch.eye(2))
    optimizer = Optimizer([item], 1.0, 100)
    factors = []
    for _ in range(100):
        factors.append(optimizer.factor)
        item.value().sum().backward()
        optimizer.step()
    top = factors.index(max(factors))
    assert 0 < factors[0] < factors[top] == pytest.approx(1.0, abs=0.05)
    assert factors[top:] == sorted(factors[top:], reverse=True) and factors[-1] == pytest.approx(0.05, abs=0.01)
