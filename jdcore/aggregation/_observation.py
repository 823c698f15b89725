from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from attrs import frozen
from torch import Tensor

from jdcore.aggregation._source import GramianSource


@frozen(eq=False)
class Observation:
    """
    What one weighing showed, for those who watch a training.

    :param method: The weighting, or the aggregator of a method that has none.
    :param source: The Jacobian. Its Gramian is computed if an observer asks and the method did not.
    :param weights: Weights [m]; None for a method whose update is no weighted sum of the rows.
    :param update: Makes the inner products [m] of the update with the rows, in float64, and the
        squared length of the update; None where these are ``G w`` and ``wᵀ G w``.
    :param seconds: Wall time of the weighing, that of the Gramian included if the method asked.
    :param residual: The largest residual that solvers reported, see :func:`report_residual`; None
        if none did, as for methods that solve nothing.
    """

    method: Any
    source: GramianSource
    weights: Tensor | None
    update: Callable[[], tuple[Tensor, Tensor]] | None
    seconds: float
    residual: float | None = None


Observer = Callable[[Observation], None]

# Of this context, so that one thread does not watch the training of another. Wrappers ask what they
# wrap through the same door: while the outermost weighs, nobody watches.
_OBSERVERS: ContextVar[tuple[Observer, ...]] = ContextVar("observers", default=())
# What solvers report while somebody observes.
_RESIDUALS: ContextVar[list[float] | None] = ContextVar("residuals", default=None)


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Tell an observer of every weighing of this context, the outermost where weightings nest."""
    token = _OBSERVERS.set((*_OBSERVERS.get(), observer))
    try:
        yield
    finally:
        _OBSERVERS.reset(token)


@contextmanager
def unobserved() -> Iterator[tuple[tuple[Observer, ...], list[float]]]:
    """
    Give the observers of this context, and tell them nothing inside of this block.

    With them comes the list of the residuals that are reported inside.
    """
    observers, residuals = _OBSERVERS.get(), list[float]()
    token, collecting = _OBSERVERS.set(()), _RESIDUALS.set(residuals)
    try:
        yield observers, residuals
    finally:
        _OBSERVERS.reset(token)
        _RESIDUALS.reset(collecting)


def observed() -> bool:
    """Whether anybody watches."""
    return bool(_OBSERVERS.get())


def report_residual(measure: Callable[[], float]) -> None:
    """
    Tell those who watch the training how well a problem was solved.

    A solver calls it once for every answer. If nobody watches, nothing is measured.

    :param measure: Gives the residual of the answer relative to the scale of the problem: what an
        :class:`~jdcore.errors.UnsolvedWarning` would tell.
    """
    residuals = _RESIDUALS.get()
    if residuals is not None:
        residuals.append(measure())
