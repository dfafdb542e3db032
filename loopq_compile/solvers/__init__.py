"""Weight solvers: integers for a weight from the statistics of its inputs.

`rtn` rounds to nearest, `gptq` compensates rounding errors through the correlations of the inputs, `loaq` aims at the
outputs of the full-precision model. The pass `solve-weights` runs them.
"""

from loopq_compile.solvers.curvature import Curvature
from loopq_compile.solvers.gptq import gptq, refine_codes, refine_scales
from loopq_compile.solvers.rtn import Grid, searched
from loopq_compile.solvers.solve import Options, Solution, solve
from loopq_compile.solvers.statistics import Moments, Split
from loopq_compile.solvers.walk import Walk

__all__ = [
    "Curvature",
    "Grid",
    "Moments",
    "Options",
    "Solution",
    "Split",
    "Walk",
    "gptq",
    "refine_codes",
    "refine_scales",
    "searched",
    "solve",
]
