"""
The contracts between the core, the methods and the solvers.

They are protocols: anything with the right call satisfies them, and nothing has to be subclassed (a
plain function is an :class:`Aggregator`). The docstrings below are the specification that the
conformance tests check and that a third party implements.

Solvers keep no state that changes an answer: one object serves every method that names the backend,
from any thread. What an iterative solver may start from is an argument, and kept by the method.

Words: ``m`` is the number of objectives (rows), ``n`` the number of parameters (columns), ``J`` the
Jacobian of shape [m, n], ``G = J Jᵀ`` its Gramian of shape [m, m].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = [
    "Aggregator",
    "BlockwiseAggregator",
    "ConflictAverseSolver",
    "DualConeSolver",
    "FairAllocationSolver",
    "GeneralizedWeighting",
    "MinNormSolver",
    "NashBargainingSolver",
    "Scalarizer",
    "Stateful",
    "Weighting",
]


@runtime_checkable
class Weighting(Protocol):
    """
    Maps a Gramian to weights.

    Laws that every weighting obeys:

    * the input is a positive semi-definite Tensor [m, m] of a real floating dtype; the output is a
      Tensor [m] of the same dtype on the same device;
    * the input is never modified;
    * m = 0 gives an empty vector;
    * NaN or infinite entries give NaN weights and leave any state as it was;
    * a call that raises leaves any state as it was.
    """

    def __call__(self, gramian: Tensor, /) -> Tensor:
        """
        :param gramian: Gramian of the Jacobian, shape [m, m].
        :returns: Weights, shape [m]. The update they stand for is ``weights @ J``.
        """


@runtime_checkable
class GeneralizedWeighting(Protocol):
    """
    Maps a generalized Gramian to a tensor of weights.

    The generalized Gramian of losses of shape [m1, ..., mk] has shape [m1, ..., mk, mk, ..., m1]:
    the second half of the dimensions is reversed. The laws of :class:`Weighting` hold for the
    flattened problem of m1 * ... * mk objectives.
    """

    def __call__(self, gramian: Tensor, /) -> Tensor:
        """
        :param gramian: Generalized Gramian, shape [m1, ..., mk, mk, ..., m1].
        :returns: Weights, shape [m1, ..., mk], to be given to ``losses.backward(weights)``.
        """


@runtime_checkable
class Aggregator(Protocol):
    """
    Maps a matrix to one vector.

    Laws that every aggregator obeys:

    * the input is a Tensor [m, n] of a real floating dtype; the output is a Tensor [n] of the same
      dtype on the same device, and the input is never modified;
    * m = 0 gives zeros, n = 0 gives an empty vector;
    * NaN or infinite entries give a vector of NaN and leave any state as it was;
    * a call that raises leaves any state as it was.
    """

    def __call__(self, matrix: Tensor, /) -> Tensor:
        """
        :param matrix: Jacobian (row i is the gradient of objective i), shape [m, n].
        :returns: The aggregated update, shape [n].
        """


@runtime_checkable
class BlockwiseAggregator(Aggregator, Protocol):
    """
    An aggregator that takes the Jacobian as column blocks and never needs it in one piece.

    ``jac_to_grad`` uses this form wherever it exists: an aggregator that lacks it forces the
    Jacobians of all parameters to be concatenated first.

    An attribute ``weighting`` is the weighting of the whole: autogram and wrappers ask it in place
    of the aggregator. A class with an attribute of that name that is a part of it only says
    ``needs_jacobian = True``.
    """

    def aggregate_blocks(self, blocks: Sequence[Tensor], /) -> tuple[list[Tensor], Tensor | None]:
        """
        Aggregate ``J = [blocks[0] | blocks[1] | ...]``.

        The result is that of calling the aggregator on the concatenation, split again, up to
        rounding (and, for stochastic methods, up to the order in which random numbers are drawn).

        :param blocks: Matrices of shapes [m, n1], [m, n2], ...; their dtypes may differ.
        :returns: The vectors of shapes [n1], [n2], ..., each in the dtype of its block, and the
            weights [m] in the promoted dtype of all blocks, or None if the update is not a weighted
            sum of the rows.
        """


@runtime_checkable
class Scalarizer(Protocol):
    """
    Makes one loss of several, to be differentiated by an ordinary backward pass.

    Laws that every scalarizer obeys:

    * the input is a Tensor [m] of a real floating dtype; the output is a Tensor of no dimensions of
      the same dtype on the same device, and the input is never modified;
    * the output depends on the losses through autograd, and on the parameters of a trainable
      scalarizer, which is a :class:`torch.nn.Module`;
    * m = 0 gives zero;
    * NaN or infinite losses give a result that is not finite and leave any state as it was;
    * a call that raises leaves any state as it was.
    """

    def __call__(self, losses: Tensor, /) -> Tensor:
        """
        :param losses: Values of the objectives, shape [m].
        :returns: One loss, shape [].
        """


@runtime_checkable
class Stateful(Protocol):
    """
    A weighting or aggregator whose result depends on earlier calls.

    ``b.load_state_dict(a.state_dict())`` makes a fresh ``b`` continue as ``a`` would. State
    dictionaries hold tensors and plain numbers only, so ``torch.load(..., weights_only=True)``
    reads them.
    """

    def reset(self) -> None:
        """Return to the state of a new object."""

    def state_dict(self) -> dict[str, Any]:
        """Copy the state; later calls do not change the copy."""

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """
        Restore a state.

        :param state: What :meth:`state_dict` returned, of an object with the same arguments.
        :raises ParameterError: If keys are missing or unknown, or a value is NaN; the state is then
            left as it was.
        """


@runtime_checkable
class DualConeSolver(Protocol):
    """
    Solves ``problem="dual_cone"``: projection onto the dual cone of the rows, in Gramian form.

    For each row u of ``references``, find ``v`` that minimises ``vᵀ G v`` subject to ``v >= u``.
    Then ``Jᵀ v`` is the projection of ``Jᵀ u`` onto the cone of vectors that conflict with no row
    of J.

    Laws: ``v >= u`` exactly; a zero row of J keeps ``v_i = u_i``; the result does not depend on the
    scale of G; an answer less accurate than promised comes with an
    :class:`~jdcore.errors.UnsolvedWarning`.

    A solver may have the method ``project(gramian, references)`` too, which does the same to
    float64 Tensors on any device: many rows on an accelerator are then projected there.
    """

    def __call__(
        self, gramian: NDArray[np.float64], references: NDArray[np.float64], /
    ) -> NDArray[np.float64]:
        """
        :param gramian: Finite Gramian, float64, shape [m, m].
        :param references: Vectors u, float64, shape [k, m].
        :returns: Vectors v, float64, shape [k, m].
        """


@runtime_checkable
class MinNormSolver(Protocol):
    """
    Solves ``problem="min_norm"``: the shortest vector in the convex hull of the rows.

    Find ``w`` that minimises ``wᵀ G w`` subject to ``w >= 0`` and ``sum(w) = 1``.

    Laws: ``w >= 0`` exactly, and the sum is one up to rounding; the result does not depend on the
    scale of G; an answer less accurate than promised comes with an
    :class:`~jdcore.errors.UnsolvedWarning`, unless the solver stands for a procedure of a paper
    that stops early by design.
    """

    def __call__(self, gramian: NDArray[np.float64], /) -> NDArray[np.float64]:
        """
        :param gramian: Finite Gramian, float64, shape [m, m].
        :returns: Weights w, float64, shape [m].
        """


@runtime_checkable
class ConflictAverseSolver(Protocol):
    """
    Solves ``problem="conflict_averse"``: the best worst case in a ball around the mean.

    With ``g0`` the mean of the rows, find the weights ``w`` of the vector ``d = Jᵀ w`` that
    maximises ``min_i g_i · d`` subject to ``‖d - g0‖ <= c ‖g0‖``. Where several vectors do (the
    maximum being zero), it is the one closest to g0.

    Laws: ``w - 1/m >= 0`` up to rounding; the result does not depend on the scale of G; an answer
    less accurate than promised comes with an :class:`~jdcore.errors.UnsolvedWarning`.
    """

    def __call__(
        self, gramian: NDArray[np.float64], c: float, level: float = 0.0, /
    ) -> NDArray[np.float64]:
        """
        :param gramian: Finite Gramian, float64, shape [m, m].
        :param c: Radius of the ball relative to the norm of g0, >= 0.
        :param level: The proximal term that G contains, relative to its diagonal, see
            :func:`jdcore.linalg.proximal_level`. Combinations of rows that are shorter than it
            explains count as zero.
        :returns: Weights w, float64, shape [m].
        """


@runtime_checkable
class FairAllocationSolver(Protocol):
    """
    Solves ``problem="fair_allocation"``: ``G w = w^(-1/alpha)`` entry by entry, for ``w > 0``.

    Laws: a zero row of J gets ``w_i = 0``; the result for ``s² G`` is
    ``s^(-2 alpha / (1 + alpha)) w``; an answer less accurate than promised comes with an
    :class:`~jdcore.errors.UnsolvedWarning`. At a Pareto-stationary point, as
    :class:`NashBargainingSolver`.
    """

    def __call__(
        self, gramian: NDArray[np.float64], alpha: float, level: float = 0.0, /
    ) -> NDArray[np.float64]:
        """
        :param gramian: Finite Gramian, float64, shape [m, m].
        :param alpha: Degree of fairness, > 0.
        :param level: As for :class:`NashBargainingSolver`.
        :returns: Weights w, float64, shape [m].
        """


@runtime_checkable
class NashBargainingSolver(Protocol):
    """
    Solves ``problem="nash_bargaining"``: ``G α = 1/α`` entry by entry, for ``α > 0``.

    The solution is unique in terms of ``Jᵀ α``, the direction of length ``√m`` that maximises the
    sum of the logarithms of its inner products with the rows.

    Laws: a zero row of J gets ``α_i = 0``; the result for ``s² G`` is ``α / s``; an answer less
    accurate than promised comes with an :class:`~jdcore.errors.UnsolvedWarning`. Where a
    non-negative combination of non-zero rows is zero (a Pareto-stationary point) no solution
    exists. The rows of such combinations then leave the game: ``Jᵀ α`` is the solution for the
    other rows, projected onto the orthogonal complement of those, and ``α >= 0`` still holds.
    """

    def __call__(
        self,
        gramian: NDArray[np.float64],
        start: NDArray[np.float64] | None = None,
        level: float = 0.0,
        /,
    ) -> NDArray[np.float64]:
        """
        :param gramian: Finite Gramian, float64, shape [m, m].
        :param start: Weights of an earlier call, float64, shape [m], from which an iteration may
            start. Not modified.
        :param level: Squared length, relative to that of the rows, of combinations that are
            rounding, see :func:`jdcore.linalg.proximal_level`. G contains no such term.
        :returns: Weights α, float64, shape [m].
        """
