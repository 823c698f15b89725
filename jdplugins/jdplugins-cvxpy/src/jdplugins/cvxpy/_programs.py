from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, TypeAlias

import cvxpy as cp
import numpy as np
from attrs import frozen
from numpy.typing import NDArray
from scipy.sparse import issparse

Floats: TypeAlias = NDArray[np.float64]

_TAG = 1000.0  # far above any constant of the programs


class BackendError(Exception):
    """The solver gave no answer; the message says why, for the warning."""


@frozen
class Compiled:
    """
    What cvxpy hands to a solver, and where the parameters stand in it.

    Filling them in here takes microseconds; the way through ``Problem.solve`` takes three times as
    long as the solver itself.

    :param data: Arguments of the solver.
    :param places: For arrays in ``data``: indices of entries, the parameters there, their signs.
    """

    data: dict[str, Any]
    chain: Any
    inverse: Any
    places: dict[str, tuple[NDArray[np.intp], NDArray[np.intp], Floats]]

    def fill(self, values: Floats) -> None:
        for key, (entries, parameters, signs) in self.places.items():
            _numbers(self.data[key])[entries] = signs * values[parameters]


class Program:
    """
    A cone program over vectors x [m] subject to ``S x + b >= 0`` (to ``>= λ a``, if it has levels).

    S [m, m], b [m] and a [m] are parameters, so cvxpy analyses the problem at the first call only.

    :param m: Number of rows.
    :param levels: True maximises λ subject to ``‖x‖ <= 1``. False minimises ``‖x‖``.
    """

    def __init__(self, m: int, levels: bool) -> None:
        self._matrix = cp.Parameter((m, m))
        self._offset = cp.Parameter(m)
        self._slope = cp.Parameter(m, nonneg=True)
        point = cp.Variable(m)
        gains = self._matrix @ point + self._offset
        if levels:
            level = cp.Variable()
            self._gains = gains >= level * self._slope
            goal, bounds = cp.Maximize(level), [self._gains, cp.norm(point) <= 1.0]
        else:
            self._gains = gains >= 0.0
            goal, bounds = cp.Minimize(cp.norm(point)), [self._gains]
        self._point = point
        self._problem = cp.Problem(goal, bounds)
        self._compiled: dict[str, Compiled | None] = {}

    def solve(
        self, matrix: Floats, offset: Floats, slope: Floats, solver: str, options: Mapping[str, Any]
    ) -> tuple[Floats, Floats]:
        """
        :returns: x [m] and the multipliers of the rows [m], >= 0.
        :raises BackendError: If the solver finds no solution.
        """
        values = np.concatenate([matrix.ravel(), offset, slope])
        try:
            with warnings.catch_warnings():
                # The residual judges the answer, and more strictly.
                warnings.filterwarnings("ignore", "Solution may be inaccurate")
                self._solve(values, solver, dict(options))
        # Each solver has exceptions of its own; all of them end up in the text of a warning.
        except Exception as error:
            raise BackendError(f"{type(error).__name__}: {error}") from error
        if self._problem.status not in (cp.OPTIMAL, cp.OPTIMAL_INACCURATE):
            raise BackendError(f"status {self._problem.status}")
        return self._point.value, np.maximum(self._gains.dual_value, 0.0)

    def _solve(self, values: Floats, solver: str, options: dict[str, Any]) -> None:
        if solver not in self._compiled:
            self._compiled[solver] = self._compile(solver)
        compiled = self._compiled[solver]
        # Warm starts would make an answer depend on the call before.
        if compiled is None:
            self._assign(values)
            self._problem.solve(solver=solver, warm_start=False, enforce_dpp=True, **options)
            return
        compiled.fill(values)
        solution = compiled.chain.solve_via_data(
            self._problem, compiled.data, warm_start=False, verbose=False, solver_opts=options
        )
        self._problem.unpack_results(solution, compiled.chain, compiled.inverse)

    def _compile(self, solver: str) -> Compiled | None:
        """Find the parameters by their values; None where that does not reproduce the data."""
        m = self._offset.shape[0]
        tags = _TAG + np.arange(m * m + 2 * m)
        data, chain, inverse = self._data(tags, solver)
        places = {
            key: _find_tags(_numbers(array)) for key, array in data.items() if _is_real(array)
        }
        compiled = Compiled(data, chain, inverse, places)
        # Tried with other numbers, as what cvxpy makes of parameters need not be a copy of them.
        other = np.random.default_rng(0).uniform(1.0, 2.0, tags.size)
        expected, _, _ = self._data(other, solver)
        compiled.fill(other)
        same = all(np.array_equal(_numbers(data[k]), _numbers(expected[k])) for k in places)
        return compiled if same else None

    def _data(self, values: Floats, solver: str) -> tuple[dict[str, Any], Any, Any]:
        self._assign(values)
        data, chain, inverse = self._problem.get_problem_data(
            solver, enforce_dpp=True, solver_opts={}
        )
        return data, chain, inverse

    def _assign(self, values: Floats) -> None:
        m = self._offset.shape[0]
        self._matrix.value = values[: m * m].reshape(m, m)
        self._offset.value = values[m * m : m * m + m]
        self._slope.value = values[m * m + m :]


def _is_real(array: Any) -> bool:
    return (issparse(array) or isinstance(array, np.ndarray)) and array.dtype.kind == "f"


def _numbers(array: Any) -> Floats:
    """The entries of an array, the stored ones of a sparse one, as a view."""
    numbers: Floats = array.data if issparse(array) else array
    return numbers


def _find_tags(numbers: Floats) -> tuple[NDArray[np.intp], NDArray[np.intp], Floats]:
    entries = np.flatnonzero(np.abs(numbers) >= _TAG)
    # A parameter may enter with a minus, but times one: else its tag would be another.
    tagged = numbers[entries]
    return entries, np.rint(np.abs(tagged) - _TAG).astype(np.intp), np.sign(tagged)


class _Programs(threading.local):
    """Programs by size. Each thread has its own, since solving changes their parameters."""

    def __init__(self) -> None:
        self.program = lru_cache(maxsize=16)(Program)


_PROGRAMS = _Programs()


def program(m: int, *, levels: bool) -> Program:
    """The compiled program of this size."""
    return _PROGRAMS.program(m, levels)
