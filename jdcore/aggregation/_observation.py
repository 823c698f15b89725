from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
from attrs import define
from numpy.typing import NDArray
from torch import Tensor

from jdcore.aggregation._source import GramianSource

_R = TypeVar("_R")
Residuals = tuple[Callable[[], float], ...]

_KEPT = 4096
"""Bytes of arrays up to which a residual is measured later, if somebody asks for it."""


@define(eq=False)  # not frozen, which would take longer at every step
class Observation:
    """
    What one weighing showed, for those who watch a training.

    :param method: The weighting, or the aggregator of a method that has none.
    :param source: The Jacobian. Its Gramian is computed if an observer asks and the method did not.
    :param weights: Weights [m]; None for a method whose update is no weighted sum of the rows. The
        caller may overwrite them later.
    :param update: Makes, given a number by which all vectors are divided first, the inner products
        [m] of the update with the rows, in float64, and the squared length of the update; None
        where these are ``G w`` and ``wᵀ G w``.
    :param seconds: Wall time of the weighing, that of the Gramian included if the method asked.
    :param residuals: What measures the residuals that solvers reported, see
        :func:`report_residual`. It holds arrays of its own, so that it may be called at any time.
    """

    method: Any
    source: GramianSource
    weights: Tensor | None
    update: Callable[[float], tuple[Tensor, Tensor]] | None
    seconds: float
    residuals: Residuals = ()

    @property
    def residual(self) -> float | None:
        """The largest residual; None if no solver reported one, as where nothing is solved."""
        return worst_of(self.residuals)


Observer = Callable[[Observation], None]

# Who watches this context, so that one thread does not watch the training of another. Wrappers ask
# what they wrap through the same door: while the outermost weighs, nobody watches, and there is a
# list of what solvers report to those who do.
_OBSERVERS: ContextVar[tuple[Observer, ...]] = ContextVar("observers", default=())
_REPORTED: ContextVar[list[Callable[[], float]] | None] = ContextVar("reported", default=None)

observed = _OBSERVERS.get
"""Who watches, if anybody does; asked in every step, without a call of Python."""


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Tell an observer of every weighing of this context, the outermost where weightings nest."""
    token = _OBSERVERS.set((*observed(), observer))
    try:
        yield
    finally:
        _OBSERVERS.reset(token)


def told(
    call: Callable[[], _R],
    observation: Callable[[_R, float, Residuals], Observation],
) -> _R:
    """
    What a call returns, after the observers of this context have heard of it.

    They hear nothing of what the call, or one of them, weighs in turn.

    :param observation: Given what was returned, the seconds that it took, and the residuals.
    """
    observers, residuals = observed(), list[Callable[[], float]]()
    # No context manager: entering one takes longer than the rest of this function.
    tokens = _OBSERVERS.set(()), _REPORTED.set(residuals)
    try:
        start = perf_counter()
        result = call()
        # After the time is taken: what observers cost is none of the weighing's.
        seen = observation(result, perf_counter() - start, tuple(residuals))
        for observer in observers:
            observer(seen)
    finally:
        _OBSERVERS.reset(tokens[0])
        _REPORTED.reset(tokens[1])
    return result


def report_residual(measure: Callable[..., float], *arrays: NDArray[np.float64]) -> None:
    """
    Tell those who watch the training how well a problem was solved.

    A solver calls it once for every answer. If nobody watches, nothing is measured. It tells
    nobody that a problem is unsolved: for that, the solver emits an
    :class:`~jdcore.errors.UnsolvedWarning`, whether or not anybody watches.

    :param measure: Gives the residual of the answer relative to the scale of the problem: what an
        :class:`~jdcore.errors.UnsolvedWarning` would tell.
    :param arrays: Arguments of ``measure``. Copies of up to 4 KiB in all are kept, and measured
        when somebody reads the residual. Larger ones, or none, mean that it is measured at once.
    """
    residuals = _REPORTED.get()
    if residuals is None:
        return
    if arrays and sum([array.nbytes for array in arrays]) <= _KEPT:
        # Copies, because the arrays may be those of the Gramian and the weights of a user.
        residuals.append(partial(measure, *[array.copy() for array in arrays]))
    else:
        residual = measure(*arrays)
        residuals.append(lambda: residual)


def worst_of(residuals: Residuals) -> float | None:
    """The largest of some residuals, None if there are none."""
    return max([measure() for measure in residuals], default=None)
