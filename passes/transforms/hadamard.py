"""Rotations that spread outliers: Hadamard matrices with random signs, as Kronecker products.

A Hadamard matrix `H` has entries of +1 and -1 and orthogonal rows, so `H / sqrt(n)` is a rotation that mixes every
input into every output with the same weight. Two constructions give the orders that occur as widths of language models:

- Sylvester: `H_2n = [[H_n, H_n], [H_n, -H_n]]`, for powers of two;
- Paley: for a prime `q`, the quadratic residues modulo `q` give order `q + 1` (if `q = 3 mod 4`) or `2 (q + 1)`
  (if `q = 1 mod 4`). That yields 12, 20, 28, 36, 44, 60, 68, 76, ...

Kronecker products of Hadamard matrices are Hadamard matrices again, so 576 = 36 * 16 and 1408 = 44 * 32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_DTYPE = torch.float64


def sylvester(order: int) -> Tensor:
    """The Hadamard matrix `[order, order]` of a power of two, entries +1 and -1."""
    matrix = torch.ones(1, 1, dtype=_DTYPE)
    while matrix.shape[0] < order:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=_DTYPE), matrix)
    return matrix


def paley(order: int) -> Tensor | None:
    """A Hadamard matrix `[order, order]` by Paley's constructions; None if no prime gives that order."""
    if order % 4:
        return None
    if _is_prime(order - 1):
        return torch.eye(order, dtype=_DTYPE) + _bordered(order - 1, sign=-1.0)
    half = order // 2
    if half % 4 == 2 and _is_prime(half - 1):
        outer, inner = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
        eye = torch.eye(half, dtype=_DTYPE)
        return torch.kron(_bordered(half - 1, sign=1.0), outer.to(_DTYPE)) + torch.kron(eye, inner.to(_DTYPE))
    return None


def _bordered(prime: int, sign: float) -> Tensor:
    """The quadratic character of all differences modulo `prime`, with a first row of ones and first column `sign`."""
    character = -torch.ones(prime, dtype=_DTYPE)
    character[torch.arange(prime) ** 2 % prime] = 1
    character[0] = 0
    matrix = torch.ones(prime + 1, prime + 1, dtype=_DTYPE)
    places = torch.arange(prime)
    matrix[1:, 1:] = character[(places[:, None] - places[None, :]) % prime]
    matrix[0, 0] = 0
    matrix[1:, 0] = sign
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def random_orthogonal(order: int, generator: torch.Generator) -> Tensor:
    """A rotation or reflection `[order, order]`, uniform over all of them."""
    q, r = torch.linalg.qr(torch.randn(order, order, dtype=_DTYPE, generator=generator))
    return (q * r.diagonal().sign()).contiguous()  # without the signs, QR favours some rotations


def balanced_factors(width: int) -> tuple[int, int]:
    """`d1 * d2 = width` with `d1 <= d2`, as close to each other as the divisors of `width` allow."""
    first = next(divisor for divisor in range(math.isqrt(width), 0, -1) if width % divisor == 0)
    return first, width // first


def hadamard_factors(width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`left [d1, d1]` and `right [d2, d2]` whose Kronecker product is a rotation of `width = d1 * d2` features.

    The product is a Hadamard matrix with random signs before each factor. If no construction gives the odd part of the
    width, a random orthogonal matrix rotates that part instead.
    """
    power = width & -width
    odd = width // power
    core, rest = torch.ones(1, 1, dtype=_DTYPE), power
    if odd > 1:
        orders = [odd << shift for shift in range(2, power.bit_length())]
        order = next((order for order in orders if paley(order) is not None), odd)
        found = paley(order)
        core = found / math.sqrt(order) if found is not None else random_orthogonal(odd, generator)
        rest = width // order
    # The rest is a power of two, divided so that the two factors have similar sizes.
    share = min((1 << shift for shift in range(rest.bit_length())), key=lambda n: len(core) * n + rest // n)
    left, right = torch.kron(core, _normal(sylvester(share))), _normal(sylvester(rest // share))
    return _signs(len(left), generator) * left, _signs(len(right), generator) * right


def _normal(matrix: Tensor) -> Tensor:
    return matrix / math.sqrt(len(matrix))


def _signs(count: int, generator: torch.Generator) -> Tensor:
    """A random sign for each row."""
    return torch.randint(0, 2, (count, 1), generator=generator).to(_DTYPE) * 2 - 1
