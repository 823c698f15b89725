from __future__ import annotations

from functools import lru_cache

import ecos
import numpy as np
from attrs import field, frozen
from numpy.typing import NDArray
from scipy.sparse import csc_matrix

from jdcore.aggregation import find_solver, report_residual, solver_field
from jdcore.errors import UnsolvedWarning, warn
from jdcore.validators import integer, real

Floats = NDArray[np.float64]

_STEP = 1e-6  # a shorter step ends the procedure, in the authors' code too
_FAR = 1e-10  # a start beyond it, or its inverse, would end in overflow
_SOLVED = (0, 10)  # exit flags of ECOS: optimal, optimal to reduced accuracy


@frozen(kw_only=True)
class EcosSolver:
    """
    Nash bargaining as published: a convex-concave procedure on `ECOS
    <https://github.com/embotech/ecos>`_.

    With ``φ_i(α) = log α_i + log (G α)_i``, the procedure minimises ``Σ (G α)_i + φ_i(α)`` subject
    to ``φ_i(α) >= 0``, each time with the concave φ of the objective replaced by its tangent at the
    last α. From `Multi-Task Learning as a Bargaining Game <https://arxiv.org/pdf/2202.01017>`_,
    section 3.2. As there, G is divided by its Frobenius norm. The constraints ``α_i (G α)_i >= 1``
    are given to ECOS as second-order cones, which describe the same set with fewer variables than
    exponential ones.

    Choose it to reproduce published results; ``"native"`` solves the equation itself, exactly, at
    any scale of the rows, and faster.

    Accuracy: ``max |α_i (G α)_i - 1| <= 1e-3``, by the published rule for stopping; usually 1e-7.
    Rows that depend on each other, or whose norms differ by more than about 1e4, are too hard for
    it, and it says so.

    :param max_iters: Number of convex problems solved, at most.
    :param tolerance: The procedure stops where ``‖G α - 1/α‖`` is below it, for the divided G; a
        result whose ``max |α_i (G α)_i - 1|`` is above it counts as unsolved.
    :param fallback: Name of the ``"nash_bargaining"`` solver that takes over where the result is
        unsolved, such as ``"native"``. None: an :class:`~jdcore.errors.UnsolvedWarning` tells.

    >>> import torch, jdcore
    >>> from jdcore.aggregation import NashMTL
    >>> solver = jdcore.get_solver("nash_bargaining", "ecos", max_iters=5)
    >>> NashMTL(solver=solver)(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    tensor([0.7071, 0.7071])
    """

    max_iters: int = field(default=20, validator=integer(1))
    tolerance: float = field(default=1e-3, validator=real(0.0))
    fallback: str | None = solver_field("nash_bargaining", default=None)

    def __call__(
        self, gramian: Floats, start: Floats | None = None, level: float = 0.0, /
    ) -> Floats:
        """
        :param gramian: Finite Gramian [m, m].
        :param start: Weights α [m] to begin with, e.g. those of the previous call.
        :param level: For the fallback: what counts as rounding of the rows.
        :returns: Weights α [m], zero for zero rows.
        """
        alpha = np.zeros(len(gramian))
        rows = np.flatnonzero(np.diagonal(gramian) > 0.0)
        if not rows.size:
            return alpha
        matrix, scale = _normalise(gramian[np.ix_(rows, rows)])
        begin = np.ones(rows.size) if start is None else start[rows] * scale
        # Not `begin <= _FAR`, which is false for NaN.
        begin[~((begin > _FAR) & (begin < 1.0 / _FAR))] = 1.0
        solution, reason = self._iterate(matrix, begin)
        residual = float(np.abs(solution * (matrix @ solution) - 1.0).max())
        if residual > self.tolerance:
            if self.fallback is not None:
                solve = find_solver("nash_bargaining", self.fallback)
                fallen: Floats = solve(gramian, start, level)
                return fallen
            warn(UnsolvedWarning("nash_bargaining", residual, reason))
        report_residual(lambda: residual)
        alpha[rows] = solution / scale
        return alpha

    def _iterate(self, matrix: Floats, alpha: Floats) -> tuple[Floats, str]:
        for _ in range(self.max_iters):
            answer = _minimise(matrix, alpha)
            if isinstance(answer, str):
                return alpha, f"ECOS failed ({answer})"
            step = float(np.linalg.norm(answer - alpha))
            alpha = answer
            gap = float(np.linalg.norm(matrix @ alpha - 1.0 / alpha))
            if step < _STEP or gap < self.tolerance:
                return alpha, "ECOS is too inaccurate on these rows"
        return alpha, f"the procedure had not converged after {self.max_iters} steps"


def _normalise(gramian: Floats) -> tuple[Floats, float]:
    """The Gramian divided by its Frobenius norm, and the square root of that norm."""
    largest = float(gramian.max())  # first, so that no square overflows
    norm = float(np.linalg.norm(gramian / largest))
    return gramian / largest / norm, float(np.sqrt(largest) * np.sqrt(norm))


def _minimise(matrix: Floats, alpha: Floats) -> Floats | str:
    """One problem of the procedure, linearised at alpha: its solution, or why there is none."""
    m = len(matrix)
    gains = matrix @ alpha
    # Where φ is not defined at alpha, as may be at the start, it has no tangent: a problem with the
    # negative slope 1 / gain would be unbounded.
    slopes = np.divide(1.0, gains, out=np.zeros(m), where=gains > 0.0)
    objective = matrix.sum(axis=0) + 1.0 / alpha + slopes @ matrix
    # Row i of a cone: (α_i + β_i, 2, α_i - β_i) with β = G α, so that α_i β_i >= 1.
    entries = np.empty((m, 2 * m))
    entries[:, 0::2] = -matrix.T
    entries[:, 1::2] = matrix.T
    diagonal = np.arange(m)
    entries[diagonal, 2 * diagonal] -= 1.0
    entries[diagonal, 2 * diagonal + 1] -= 1.0
    indices, pointers = _pattern(m)
    constraints = csc_matrix((entries.ravel(), indices, pointers), shape=(3 * m, m))
    offsets = np.tile([0.0, 2.0, 0.0], m)
    cones = {"l": 0, "q": [3] * m, "e": 0}
    found = ecos.solve(objective, constraints, offsets, cones, verbose=False, max_iters=100)
    solution: Floats = found["x"]
    if found["info"]["exitFlag"] not in _SOLVED or not (solution > 0.0).all():
        return str(found["info"]["infostring"])
    return solution


@lru_cache(maxsize=16)
def _pattern(m: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row indices and column pointers of the constraints, which depend on the size only."""
    column = np.sort(np.concatenate([3 * np.arange(m), 3 * np.arange(m) + 2]))
    return np.tile(column, m), 2 * m * np.arange(m + 1)
