from __future__ import annotations

import torch
from attrs import frozen
from torch import Tensor

from jdcore.aggregation import report_residual
from jdcore.linalg import lcp_residual
from jdplugins.standard._solvers._cone_of_few import lcps_of, project_few
from jdplugins.standard._solvers._lcp import ROUGH, Floats, solve_lcps
from jdplugins.standard._solvers._semidefinite import is_plausible, nearest_semidefinite
from jdplugins.standard._solvers._unsolved import UNSOLVED, warn_if_unsolved


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
        found = project_few(gramian, references)
        if found is not None:
            report_residual(_residual, gramian, references, found)
            return found
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


def _residual(gramian: Floats, references: Floats, found: Floats) -> float:
    """The largest residual of some projections, as that of the problem that is solved."""
    cosines, norms, _, scales, Q = lcps_of(gramian, references)
    Z = (found - references) * norms / scales
    return float(lcp_residual(cosines, Q, Z).max(initial=0.0))


def _solve(C: Tensor, U: Tensor) -> Tensor:
    """Solutions of the LCPs with ``q = C u`` for the rows u of U."""
    if not U.numel():
        return torch.zeros_like(U)
    Q = _products(C, U)
    Z, residuals = solve_lcps(C, Q)
    worst = float(residuals.max())
    if worst > ROUGH or not is_plausible(C, U, Q, Z):
        # Not before, as eigenvalues take longer than most solutions.
        definite = nearest_semidefinite(C)
        if definite is not C:
            return _solve(definite, U)
    if not worst <= UNSOLVED:
        Z = _shortened(C, U, Z)
        # Of the answer that is given, at which the solver has not looked.
        arrays = [tensor.numpy(force=True) for tensor in (C, Q, Z)]
        worst = float(lcp_residual(*arrays).max())
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
