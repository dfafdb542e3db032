"""Rounding that compensates its own errors: GPTQ, and coordinate descent from its result.

Both minimize `tr((Q - W) H̃ (Q - W)ᵀ)` over the points `Q` of a grid, with `W` `[out, K]` the target and `H̃` the
damped Hessian of the inputs. Rows do not depend on each other.

GPTQ (Frantar et al. 2022, arXiv 2210.17323) rounds column by column and moves the columns not yet rounded so that they
best compensate the error. Then coordinate descent chooses codes and scales again, one at a time, each with all others
fixed (the idea of QuantEase, Behdin et al. 2023, arXiv 2309.01885), which can only lower the error:

    code of column j:   q_j <- grid point nearest to q_j + g_j / H̃_jj
    scale of group G:   s_G <- s_G + c_Gᵀ g_G / (c_Gᵀ H̃_GG c_G)          with c the codes,   g = H̃ (w - q)

A rank-one product for every decision keeps `g` up to date, gathered in blocks of columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loopq_compile.solvers.curvature import Curvature
from loopq_compile.solvers.rtn import Grid

BLOCK = 64
"""Columns whose effect on the others is gathered in one matrix product."""


def gptq(target: Tensor, curvature: Curvature, grid: Grid) -> Tensor:
    """Codes for the `target` `[out, K]` by error feedback; floats with integer values `[out, K]`."""
    order, feedback = curvature.order, curvature.feedback()
    # Transposed: a column of the weight is a row in memory.
    rows, steps = target.t()[order], grid.steps.t()[order].contiguous()
    codes = torch.empty_like(rows)
    for begin in range(0, len(rows), BLOCK):
        end = min(begin + BLOCK, len(rows))
        errors = torch.empty_like(rows[begin:end])
        for j in range(begin, end):
            torch.clamp((rows[j] / steps[j]).round_(), grid.q_min, grid.q_max, out=codes[j])
            error = torch.sub(rows[j], codes[j] * steps[j], out=errors[j - begin])
            rows[j + 1 : end].addr_(feedback[j, j + 1 : end], error, alpha=-1)
        rows[end:].addmm_(feedback[begin:end, end:].t(), errors, alpha=-1)
    result = torch.empty_like(codes)
    result[order] = codes
    return result.t().contiguous()


def refine_codes(codes: Tensor, target: Tensor, curvature: Curvature, grid: Grid) -> Tensor:
    """One sweep of coordinate descent over all codes `[out, K]`; the scales stay."""
    matrix, steps = curvature.matrix, grid.steps.t().contiguous()
    codes = codes.t().contiguous()
    values = codes * steps
    slope = matrix @ (target.t() - values)
    for begin in range(0, len(codes), BLOCK):
        end = min(begin + BLOCK, len(codes))
        moves, local = torch.empty_like(slope[begin:end]), slope[begin:end]
        for j in range(begin, end):
            wanted = torch.add(values[j], slope[j], alpha=1 / float(matrix[j, j]))
            torch.clamp(wanted.div_(steps[j]).round_(), grid.q_min, grid.q_max, out=codes[j])
            move = torch.sub(codes[j] * steps[j], values[j], out=moves[j - begin])
            local.addr_(matrix[begin:end, j], move, alpha=-1)
        slope[end:].addmm_(matrix[end:, begin:end], moves, alpha=-1)
    return codes.t().contiguous()


def refine_scales(codes: Tensor, target: Tensor, curvature: Curvature, grid: Grid) -> Grid:
    """One sweep of coordinate descent over all scales; the codes stay. A scale that would change its sign is kept."""
    matrix, columns = curvature.matrix, codes.t().contiguous()
    scale = grid.scale.clone()
    slope = matrix @ (target - grid.values(codes)).t()
    block = max(grid.size, BLOCK // grid.size * grid.size)
    for begin in range(0, len(columns), block):
        end = min(begin + block, len(columns))
        moves = columns[begin:end].clone()
        for first in range(begin, end, grid.size):
            group, members = first // grid.size, slice(first, first + grid.size)
            effect = matrix[first:end, members] @ columns[members]
            gain = (columns[members] * slope[members]).sum(0)
            curve = (columns[members] * effect[: grid.size]).sum(0)
            move = torch.where(curve > 0, gain / curve, torch.zeros_like(curve))
            # Beyond a factor of two the codes would differ: descent in codes comes first.
            move = torch.where(1 + move / scale[:, group] > 0.5, move, torch.zeros_like(move))
            scale[:, group] += move
            slope[first:end].addcmul_(effect, move, value=-1)
            moves[first - begin : first - begin + grid.size] *= move
        slope[end:].addmm_(matrix[end:, begin:end], moves, alpha=-1)
    return grid.scaled(scale)
