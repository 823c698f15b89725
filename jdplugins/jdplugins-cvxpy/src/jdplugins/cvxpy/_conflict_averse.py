from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

import cvxpy as cp
import numpy as np
from attrs import Attribute, field, frozen

from jdcore.aggregation import find_solver, report_residual, solver_field
from jdcore.errors import ParameterTypeError, UnknownNameError, UnsolvedWarning, warn
from jdcore.linalg import eigh, equilibrate
from jdcore.validators import real
from jdplugins.cvxpy._programs import BackendError, Floats, program

# The multipliers have fewer digits than the objective, so that needs more than by default.
_PRECISE = {"CLARABEL": {"tol_gap_abs": 1e-10, "tol_gap_rel": 1e-10, "tol_feas": 1e-10}}
# Rows of which a combination is shorter than this may be Pareto-stationary. Then the ball does not
# bind, and the multipliers do not tell where in it to go.
_STATIONARY = 1e-3


def _upper(name: Any) -> Any:
    return name.upper() if isinstance(name, str) else name


def _installed(_: object, attribute: Attribute[Any], name: Any) -> None:
    if not isinstance(name, str):
        raise ParameterTypeError(attribute.name, "the name of a solver", repr(name))
    available = sorted(cp.installed_solvers())
    if name not in available:
        close = difflib.get_close_matches(name, available)
        hint = "Only solvers that are installed count."
        raise UnknownNameError(name, "backend of cvxpy", close, available, hint)


@frozen(kw_only=True)
class CvxpySolver:
    """
    The conflict-averse direction by `cvxpy <https://www.cvxpy.org>`_, as a cone program.

    With C the cosines of the rows, ``C = S Sᵀ``, and everything relative to the radius of the ball,
    it maximises λ subject to ``S x + b >= λ a`` and ``‖x‖ <= 1``, where x stands for ``d - g0``, b
    for the gains of g0, and a for the inverse norms. The multipliers of the rows are the weights.
    The program is compiled once per number of rows (and thread).

    Choose it to check ``"native"``, which is exact and faster, against an independent solver.

    Accuracy: relative to the radius of the ball, the gains are at most ``tolerance`` below those
    that the multipliers prove to be the best possible. Measured on the well-posed families of
    :mod:`jdcore.testing`: 1e-6 for CLARABEL, 1e-5 for ECOS and SCS.

    :param backend: Name of the solver, as cvxpy spells it, in any case.
    :param options: Options of the solver, as ``Problem.solve`` of cvxpy takes them. By default,
        CLARABEL is asked for more digits than it gives by itself, any other solver for nothing.
    :param tolerance: Residual above which an answer counts as unsolved.
    :param fallback: Name of the ``"conflict_averse"`` solver that takes over where the answer is
        unsolved, such as ``"native"``. None: an :class:`~jdcore.errors.UnsolvedWarning` tells.
    :raises UnknownNameError: If the solver is not installed; the message lists those that are.

    >>> import torch
    >>> from jdcore.aggregation import CAGrad
    >>> CAGrad(c=0.5, solver="cvxpy")(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
    tensor([0.1835, 1.2041, 1.2041])
    """

    backend: str = field(default="CLARABEL", kw_only=False, converter=_upper, validator=_installed)
    options: Mapping[str, Any] | None = None
    tolerance: float = field(default=1e-4, validator=real(0.0))
    fallback: str | None = solver_field("conflict_averse", default=None)

    def __call__(self, gramian: Floats, c: float, level: float = 0.0, /) -> Floats:
        """
        :param gramian: Finite Gramian [m, m].
        :param c: Radius of the ball relative to the norm of g0, >= 0.
        :param level: For the fallback: the proximal term that the Gramian contains.
        :returns: Weights w [m].
        """
        m = len(gramian)
        weights = np.full(m, 1.0 / m)
        rows = np.flatnonzero(np.diagonal(gramian) > 0.0)
        cosines, norms, inverses = equilibrate(gramian[np.ix_(rows, rows)])
        shares = norms / norms.max(initial=0.0) / m if rows.size else norms
        squared = float(shares @ cosines @ shares)
        # Up to rounding, g0 is zero, and so is the ball.
        if c == 0.0 or squared <= m * np.finfo(float).eps * float(shares @ shares):
            return weights
        radius = c * math.sqrt(squared)
        slopes = norms.min() * inverses
        added, residual, reason = self._solve(cosines, cosines @ shares / radius, slopes)
        if residual > self.tolerance:
            if self.fallback is not None:
                fallen: Floats = find_solver("conflict_averse", self.fallback)(gramian, c, level)
                return fallen
            warn(UnsolvedWarning("conflict_averse", residual, reason))
        report_residual(lambda: residual)
        weights[rows] += radius * added * norms.max() * inverses
        return weights

    def _solve(self, C: Floats, b: Floats, a: Floats) -> tuple[Floats, float, str]:
        """Weights to add in units of the radius, their residual, and what it comes from."""
        root = _root(C)
        backend = f"cvxpy:{self.backend}"
        options = _PRECISE.get(self.backend, {}) if self.options is None else self.options
        arguments = (root, b, a, self.backend, options)
        try:
            _, multipliers = program(len(C), levels=True).solve(*arguments)
            multipliers /= a @ multipliers
            length = float(np.linalg.norm(multipliers @ root))
            bound = float(b @ multipliers) + length
            added = multipliers / length if length > 0.0 else multipliers
            if length < _STATIONARY:
                point, multipliers = program(len(C), levels=False).solve(*arguments)
                closest = multipliers * float(np.linalg.norm(point))
                added = min(added, closest, key=lambda v: _residual(C, b, a, v, bound))
        except BackendError as error:
            nothing = np.zeros_like(b)
            bound = float(((b + 1.0) / a).min())  # of what a ball of radius one can add to a row
            # To add nothing is allowed, and its residual tells how much that gives away.
            return nothing, _residual(C, b, a, nothing, bound), f"{backend} failed ({error})"
        residual = _residual(C, b, a, added, bound)
        return added, residual, f"{backend} is too inaccurate on these rows"


def _root(C: Floats) -> Floats:
    """S with ``C = S Sᵀ``, also for singular C."""
    values, vectors = eigh(C)
    # Rounding may leave eigenvalues of zero slightly negative.
    root: Floats = vectors * np.sqrt(np.maximum(values, 0.0))
    return root


def _residual(C: Floats, b: Floats, a: Floats, v: Floats, bound: float) -> float:
    """By how much the gains of v fall short of the bound, or v of staying in the ball."""
    product = C @ v
    shortfall = float((a * bound - product - b).max())
    outside = math.sqrt(max(float(v @ product), 0.0)) - 1.0
    return max(shortfall, outside, 0.0)
