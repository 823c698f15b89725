from __future__ import annotations

from collections.abc import Callable

import torch
from attrs import frozen
from torch import Tensor

from jdcore.linalg import factorize, substitute
from jdplugins.standard._solvers._gains import bargain

_PROXIMAL = 1e-9
_MANY = 1e3  # weights of rows that cancel are some ten thousand then, those of others a few
_VANISHING = 1e-7  # a combination of rows that is zero but for rounding: its products with them
_GONE = 1e-9  # squared length of what a row has beside those that cancel, where it has nothing
_POSITIVE = 1e-6  # entries of v
_ROUNDING = 1e-12  # of q, and of the squared lengths of what is left of rows
_TRIES, _REFINEMENTS, _PASSES = 4, 2, 2


@frozen
class Face:
    """
    Rows that cancel: ``v >= 0`` with ``C v = 0``, positive on as many of them as can be.

    No vector of the dual cone has a part along these rows. So whatever their weights are, multiples
    of v make them positive, and what is left is a problem of the other rows, in the space that is
    orthogonal to these.

    :param C: Positive semi-definite matrix with a unit diagonal [m, m].
    :param inside: The indices of the rows that cancel.
    :param outside: Those of the others.
    :param v: The entries of v inside.
    """

    C: Tensor
    inside: Tensor
    outside: Tensor
    v: Tensor

    def solve(self, Q: Tensor, near: Tensor, solver: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """
        Solve linear complementarity problems.

        :param Q: Vectors q, one problem per row [k, m].
        :param near: About where solutions are [k, m], of which these are many.
        :param solver: What solves those of the other rows, for a matrix with a unit diagonal.
        :returns: Z [k, m].
        """
        inside, outside, C = self.inside, self.outside, self.C
        block, across = C[inside][:, inside], C[inside][:, outside]
        solve = _pseudoinverse(block)
        free, shadows = solve(Q[:, inside].mT).mT, solve(across)
        left = C[outside][:, outside] - across.mT @ shadows
        left.diagonal().add_(_ROUNDING)  # what is left of short ones is not semi-definite
        lengths = left.diagonal().sqrt()
        cosines = left / lengths / lengths[:, None]
        Z = torch.zeros_like(Q)
        # Up to multiples of v, what is nearest to where it should be.
        along = near[:, inside]
        along = along - solve(block @ along.mT).mT
        # What cancels but for rounding is seen by the others, once it is long enough.
        for _ in range(_PASSES if len(outside) else 1):
            if len(outside):
                q = Q[:, outside] + (along - free) @ across
                zero = q.abs().amax(1, keepdim=True) <= _ROUNDING
                q = q / lengths
                sizes = torch.where(zero, torch.inf, q.abs().amax(1, keepdim=True))
                z = solver(cosines, q / sizes)
                Z[:, outside] = torch.where(sizes < torch.inf, z * sizes, 0.0) / lengths
            z = along - free - Z[:, outside] @ shadows.mT
            multiples = (-z / self.v).amax(1, keepdim=True).clamp_min_(0.0)
            along = torch.addcmul(along, multiples, self.v)
            Z[:, inside] = torch.addcmul(z, multiples, self.v).clamp_min_(0.0)
        return Z


def find_face(C: Tensor) -> Face | None:
    """The rows that cancel; None if there are none."""
    weights = torch.from_numpy(bargain(C.numpy(force=True), _PROXIMAL)).to(C.device)
    cancelling = weights > _MANY
    for _ in range(_TRIES):
        inside, outside = cancelling.nonzero()[:, 0], (~cancelling).nonzero()[:, 0]
        if not len(inside):
            break
        block = C[inside][:, inside]
        solve = _pseudoinverse(block)
        v = weights[inside][:, None]
        v = (v - solve(block @ v))[:, 0]
        v /= v.max()
        # Rows that were taken to cancel, and such as lie in the span of those that do.
        staying = v > _POSITIVE
        across = C[inside][:, outside]
        joining = C.diagonal()[outside] - (across * solve(across)).sum(0) < _GONE
        if bool(staying.all()) and not bool(joining.any()):
            vanishing = float((C[:, inside] @ v).abs().max()) <= _VANISHING
            return Face(C, inside, outside, v) if vanishing else None
        cancelling[inside[~staying]] = False
        cancelling[outside[joining]] = bool(staying.all())
    return None


def _pseudoinverse(block: Tensor) -> Callable[[Tensor], Tensor]:
    """Solves with a block but for what vanishes: nothing is returned along that."""
    shifted = block.clone()
    shifted.diagonal().add_(_PROXIMAL)
    factor = factorize(shifted)[0]

    def solve(b: Tensor) -> Tensor:
        x = substitute(factor, b)
        for _ in range(_REFINEMENTS):
            x += substitute(factor, b - block @ x)
        return x

    return solve
