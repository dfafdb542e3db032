"""`loopq_triton::transition_adapter_row` against its definition."""

import pytest
import torch

from loopq_compile.operators import ops
from tests.backends.triton.kernels import kernels


def tables(width, rank, rows=3):
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, 1), (rows, width), (rows, width), (rows, rank), (width, rank), (width, rank)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize(("width", "rank"), [(64, 8), (100, 5), (600, 1), (1536, 8)])
@pytest.mark.parametrize("loop", [0, 2, 5])
def test_equals_the_definition(width, rank, loop):
    u = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(1))
    arguments = (u, *tables(width, rank), loop)
    expected = ops.transition_adapter_row(*arguments)
    torch.testing.assert_close(kernels.transition_adapter_row(*arguments), expected, rtol=1e-5, atol=2e-5 * width**0.5)


def test_tables_may_lie_in_any_order_and_be_shared_by_all_loops():
    gate, gain, shift, mix, down, up = tables(64, 8)
    u = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1))
    turned = [part.t().contiguous().t() for part in (shift, mix, down, up)]
    arguments = (u, gate, gain[:1], *turned, 2)
    expected = ops.transition_adapter_row(*arguments)
    torch.testing.assert_close(kernels.transition_adapter_row(*arguments), expected, rtol=1e-5, atol=2e-4)


def test_an_adapter_of_zeros_changes_nothing():
    gate, gain, shift, mix, down, up = tables(64, 8)
    u = torch.randn(4, 64).to(torch.bfloat16)
    found = kernels.transition_adapter_row(u, gate, gain * 0, shift * 0, mix * 0, down, up, 1)
    assert torch.equal(found, u)
