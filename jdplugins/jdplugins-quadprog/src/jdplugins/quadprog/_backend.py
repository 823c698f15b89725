from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from attrs import field, frozen
from numpy.typing import NDArray

from jdcore.aggregation import find_solver, report_residual, solver_field
from jdcore.errors import UnsolvedWarning, warn
from jdcore.linalg import equilibrate, lcp_residual, refine_lcp
from jdcore.validators import real

Floats: TypeAlias = NDArray[np.float64]
Minimiser: TypeAlias = Callable[[Floats], Floats]

# Makes the matrix positive definite, as the solvers ask; refinement takes the error away again.
_SHIFT = 1e-10


class BackendError(Exception):
    """The solver gave no answer; the message says why, for the warning."""


@frozen(kw_only=True)
class DualConeBackend:
    """
    Projection onto the dual cone by a quadratic-programming solver.

    With D the diagonal matrix of the row norms, ``C = D⁻¹ G D⁻¹`` and ``v = u + D⁻¹ z``, the solver
    minimises ``½ zᵀ C z + (C D u)ᵀ z`` over ``z >= 0``, so the scales of the rows never reach it.
    :func:`~jdcore.linalg.refine_lcp` then replaces the digits of the solver by those of float64.

    :param tolerance: Residual (see :func:`~jdcore.linalg.lcp_residual`) above which an answer
        counts as unsolved.
    :param fallback: Name of the ``"dual_cone"`` solver that takes over where the answer is
        unsolved, such as ``"native"``. None: an :class:`~jdcore.errors.UnsolvedWarning` tells.
    """

    tolerance: float = field(default=1e-10, validator=real(0.0))
    fallback: str | None = solver_field("dual_cone", default=None)

    @property
    def label(self) -> str:
        """What warnings call this solver."""
        raise NotImplementedError

    def minimiser(self, quadratic: Floats) -> Minimiser:
        """
        Make the function that minimises ``½ zᵀ P z + qᵀ z`` over ``z >= 0`` for a given q.

        :param quadratic: Positive definite matrix P [m, m].
        :returns: q [m] -> z [m]; it raises :class:`BackendError` where it finds no answer.
        """
        raise NotImplementedError

    def __call__(self, gramian: Floats, references: Floats, /) -> Floats:
        """
        :param gramian: Finite Gramian [m, m].
        :param references: Vectors u [k, m].
        :returns: Vectors v [k, m], each ``>= u`` exactly.
        """
        cosines, norms, inverses = equilibrate(gramian)
        scaled = references * norms
        # Answers grow with the references: each is made of size one, which the absolute
        # tolerances of solvers are meant for.
        scales = np.abs(scaled).max(axis=1, initial=0.0, keepdims=True)
        scaled /= np.where(scales > 0.0, scales, 1.0)
        solutions, residual, reason = self._solve(cosines, scaled @ cosines)
        if residual > self.tolerance:
            if self.fallback is not None:
                projected: Floats = find_solver("dual_cone", self.fallback)(gramian, references)
                return projected
            warn(UnsolvedWarning("dual_cone", residual, reason))
        report_residual(lambda: residual)
        solutions *= scales
        solutions *= inverses
        # Nothing negative is added, so that v >= u also after rounding.
        solutions += references
        return solutions

    def _solve(self, C: Floats, Q: Floats) -> tuple[Floats, float, str]:
        """Answers to all rows of Q, the largest residual, and what it comes from."""
        minimise = self.minimiser(C + _SHIFT * np.eye(len(C)))
        answers = np.zeros_like(Q)
        failures: dict[int, str] = {}
        # Where q is nowhere negative, z = 0 solves the problem.
        for row in np.flatnonzero(Q.min(axis=1, initial=0.0) < 0.0).tolist():
            answer = _attempt(minimise, Q[row])
            if isinstance(answer, str):
                failures[row] = f"{self.label} failed ({answer})"
            else:
                # Interior-point solvers leave slightly negative entries.
                answers[row] = np.maximum(answer, 0.0)
        solutions, residuals = refine_lcp(C, Q, answers)
        # What refining makes of nothing would not be an answer of this solver.
        failed = list(failures)
        solutions[failed] = 0.0
        residuals[failed] = lcp_residual(C, Q[failed], solutions[failed])
        # The worst row is the one that a warning is about, whose failure it names.
        worst = int(residuals.argmax()) if residuals.size else -1
        reason = failures.get(worst, f"{self.label} is too inaccurate on these rows")
        return solutions, float(residuals.max(initial=0.0)), reason


def _attempt(minimise: Minimiser, linear: Floats) -> Floats | str:
    """The answer, or why there is none."""
    try:
        return minimise(linear)
    except BackendError as error:
        return str(error)
