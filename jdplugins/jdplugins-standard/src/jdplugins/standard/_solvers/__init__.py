"""
Native solvers: exact, scale-free, torch and numpy only.

The dual-cone projection, the min-norm point and the conflict-averse direction all reduce to one
linear complementarity problem (LCP) with the matrix of cosines of the rows. One solver serves them:
a guess, block pivoting from there, and an active-set method for what is left; up to some 90 rows
that depend on each other take parametric pivots, and a handful of rows plain floats. Nash
bargaining is solved by Newton's method.
"""

from jdplugins.standard._solvers._alone import solve_one
from jdplugins.standard._solvers._conflict_averse import Bracket, NativeConflictAverseSolver
from jdplugins.standard._solvers._dual_cone import NativeDualConeSolver
from jdplugins.standard._solvers._frank_wolfe import FrankWolfeSolver
from jdplugins.standard._solvers._gains import (
    NativeFairAllocationSolver,
    NativeNashBargainingSolver,
)
from jdplugins.standard._solvers._min_norm import NativeMinNormSolver

__all__ = [
    "Bracket",
    "FrankWolfeSolver",
    "NativeConflictAverseSolver",
    "NativeDualConeSolver",
    "NativeFairAllocationSolver",
    "NativeMinNormSolver",
    "NativeNashBargainingSolver",
    "solve_one",
]
