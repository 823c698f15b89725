from __future__ import annotations

import numpy as np
import torch
from attrs import frozen
from torch import Tensor

from jdcore.aggregation import report_residual
from jdcore.linalg import equilibrate, exchange_few, lcp_residual, product
from jdplugins.standard._solvers._alone import EXACT, LARGE, solve_alone
from jdplugins.standard._solvers._cone_of_few import project_few
from jdplugins.standard._solvers._lcp import ROUGH, Floats, solve_lcps
from jdplugins.standard._solvers._semidefinite import nearest_semidefinite
from jdplugins.standard._solvers._unsolved import UNSOLVED, warn_if_unsolved

# Rows up to which a call of numpy takes longer than the arithmetic, and one of torch.
_FEW, _SMALL = 8, 32


@frozen
class NativeDualConeSolver:
    """
    Exact projection onto the dual cone; the native solver of ``problem="dual_cone"``.

    With D the diagonal matrix of the row norms, ``C = D⁻¹ G D⁻¹`` and ``v = u + D⁻¹ z``, the
    problem is the LCP ``z >= 0``, ``C z + C D u >= 0``, both complementary: the scales of the rows
    and of u leave it exactly.

    A solution is accurate to float64. It comes with an :class:`~jdcore.errors.UnsolvedWarning`
    where its natural residual exceeds 1e-10 of ``1 + max z`` (with u scaled to
    ``max |D u| = 1``), four orders above what rounding C alone explains at a hundred rows. Even
    then, the answer is no longer than what is projected.
    """

    def __call__(self, gramian: Floats, references: Floats, /) -> Floats:
        """
        :param gramian: Finite Gramian [m, m].
        :param references: Vectors u [k, m].
        :returns: Vectors v [k, m], each ``>= u`` exactly.
        """
        if len(gramian) <= _FEW:
            few = project_few(gramian.tolist(), references.tolist())
            if few is not None:
                found = np.array(few) if few else references.copy()
                report_residual(_residual, gramian, references, found)
                return found
        # In the cone already, as the mean of the rows often is: told without numpy's reductions,
        # which would take longer than the rest.
        if len(references) == 1 and min(product(gramian, references[0]).tolist()) >= 0.0:
            report_residual(lambda: 0.0)
            return np.array(references)
        if len(gramian) <= _SMALL or len(references) == 1:
            small = _project_small(gramian, references)
            if small is not None:
                report_residual(_residual, gramian, references, small)
                return small
        projected = self.project(torch.from_numpy(gramian), torch.from_numpy(references))
        array: Floats = projected.numpy()
        return array

    def project(self, gramian: Tensor, references: Tensor) -> Tensor:
        """A call for float64 Tensors on any device, where it solves."""
        norms = gramian.diagonal().sqrt()
        inverses = torch.where(norms > 0.0, 1.0 / norms, 0.0)
        # Two products rather than one with the outer product, which would overflow for tiny norms.
        cosines = (gramian * inverses[:, None]).mul_(inverses)
        cosines.diagonal().fill_(1.0)  # for zero rows too, which are left alone then
        scaled = references * norms
        scales = scaled.abs().amax(1, keepdim=True) if scaled.numel() else scaled.sum(1, True)
        scaled /= torch.where(scales > 0.0, scales, 1.0)
        return _solve(cosines, scaled).mul_(scales).mul_(inverses).add_(references)


def _project_small(gramian: Floats, references: Floats) -> Floats | None:
    """
    One projection, or those of few rows, in numpy, whose calls take half as long as torch's.

    None where that takes more.
    """
    cosines, norms, inverses = equilibrate(gramian)
    scaled = references * norms
    scales = np.abs(scaled).max(axis=1, initial=0.0, keepdims=True)
    scales[scales == 0.0] = 1.0
    Q = product(scaled / scales, cosines)
    if len(Q) == 1:
        alone = solve_alone(cosines, Q[0], None)
        Z = None if alone is None else alone[0][None]
    else:
        Z = _exchanged(cosines, Q)
    return None if Z is None else references + Z * inverses * scales


def _exchanged(C: Floats, Q: Floats) -> Floats | None:
    """Solutions of the LCPs of all rows of Q; None where they are not exact."""
    Z = np.maximum(-Q, 0.0)
    # After one projected gradient step, which is nearer the truth than ``q < 0``.
    passive = Z.dot(C) + Q < Z
    try:
        found = exchange_few(C, Q, -Q, passive)
    except np.linalg.LinAlgError:
        return None
    if found is None or found.max(initial=0.0) > LARGE:
        return None
    return found if lcp_residual(C, Q, found).max(initial=0.0) <= EXACT else None


def _residual(gramian: Floats, references: Floats, found: Floats) -> float:
    """The largest residual of some projections, as that of the problem that is solved."""
    cosines, norms, _ = equilibrate(gramian)
    scaled = references * norms
    scales = np.abs(scaled).max(axis=1, initial=0.0, keepdims=True)
    scales[scales == 0.0] = 1.0
    Z = (found - references) * norms / scales
    return float(lcp_residual(cosines, product(scaled / scales, cosines), Z).max(initial=0.0))


def _solve(C: Tensor, U: Tensor) -> Tensor:
    """Solutions of the LCPs with ``q = C u`` for the rows u of U."""
    if not U.numel():
        return torch.zeros_like(U)
    Z, residuals = solve_lcps(C, _products(C, U))
    worst = float(residuals.max())
    if worst > ROUGH:
        # Not before, as eigenvalues take longer than most solutions.
        definite = nearest_semidefinite(C)
        if definite is not C:
            return _solve(definite, U)
    if not worst <= UNSOLVED:
        Z = _shortened(C, U, Z)
    warn_if_unsolved("dual_cone", worst)
    return Z


def _products(C: Tensor, U: Tensor) -> Tensor:
    """``U C``, for UPGrad, whose U is diagonal, without the products."""
    diagonal = U.diagonal()
    if len(U) == len(C) and torch.count_nonzero(U) == torch.count_nonzero(diagonal):
        return C * diagonal[:, None]
    return U @ C


def _shortened(C: Tensor, U: Tensor, Z: Tensor) -> Tensor:
    """The multiples of z, up to z itself, for which ``Jᵀ (u + z)`` is shortest."""
    image = Z @ C
    slope, curvature = (image * U).sum(1, keepdim=True), (image * Z).sum(1, keepdim=True)
    return Z * (-slope / curvature.clamp_min(1e-300)).clamp(0.0, 1.0)
