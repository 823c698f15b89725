from __future__ import annotations

from inspect import isroutine, signature
from typing import Any

import numpy as np
from attrs import Attribute, field
from numpy.typing import NDArray

from jdcore._registry import shared_solver
from jdcore.aggregation._answers import describe_answer, real_array
from jdcore.errors import ParameterError, ParameterTypeError, PluginError, UnknownNameError


def solver_field(problem: str, *, default: str | None = "native") -> Any:
    """
    The attrs field ``solver`` of a method that poses a problem (or ``fallback`` of a solver).

    It takes the name of a registered backend or an object with the call of the problem's protocol.
    A name that is not registered, and an object that is not called as the default backend is, are
    refused on construction and on every later set; it is the name that is kept, shown and pickled.
    Use with :func:`solution`.

    :param problem: The problem, e.g. ``"dual_cone"``.
    :param default: Name of the default backend. None makes the solver optional.
    """

    def validate(_: Any, attribute: Attribute[Any], value: Any) -> None:
        if value is None and default is None:
            return
        solver, hint = find_solver(problem, value), None
        if isinstance(value, type):
            hint = f"Make one: {value.__name__}()."
        elif callable(solver):
            if isinstance(value, str) or default is None:
                return
            try:
                names = signature(find_solver(problem, default)).parameters
            except (UnknownNameError, PluginError):  # an object is what to give where it is missing
                return
            if _takes(solver, len(names)):
                return
            hint = f"It is called as solver({', '.join(names)})."
        expected = f"the name of a {problem} solver or such a solver"
        raise ParameterTypeError(attribute.name, expected, repr(value), hint)

    metadata = {"jdcore.problem": problem}  # for those who list the solvers of a method
    return field(default=default, kw_only=True, validator=validate, metadata=metadata)


def _takes(solver: Any, count: int) -> bool:
    """Whether a solver takes so many arguments by position, as far as it tells."""
    try:
        # Asked itself, as what a decorator wraps may be called in another way; and of objects, the
        # call that is bound to them, be it that of a class.
        call = solver if isroutine(solver) else solver.__call__
        told = signature(call, follow_wrapped=False)
    except Exception:  # a function of another language, or an object that tells something else
        return True
    try:
        told.bind(*[None] * count)
    except TypeError:
        return False
    return True


def find_solver(problem: str, solver: Any) -> Any:
    """
    The solver a ``solver`` field stands for: the object itself, or the backend of that name.

    :raises UnknownNameError: If no backend for this problem has the name.
    :raises PluginError: If the backend cannot be loaded.
    """
    # Looked up at each call, so that a solver that is registered anew is used from then on.
    return shared_solver(problem, solver) if isinstance(solver, str) else solver


def solution(
    problem: str, solver: Any, shape: tuple[int, ...], /, *arguments: Any
) -> NDArray[np.float64]:
    """
    What a solver answers, which may be anybody's.

    :param solver: The value of a ``solver`` field, as for :func:`find_solver`.
    :param shape: That of the answer.
    :param arguments: Those of the problem's protocol.
    :returns: float64 array of that shape.
    :raises ParameterError: If the answer is something else.
    """
    # As `find_solver` does, which is one more call.
    found = (shared_solver(problem, solver) if isinstance(solver, str) else solver)(*arguments)
    if type(found) is np.ndarray and found.shape == shape and found.dtype == np.float64:
        return found
    answer = real_array(found)
    if answer is not None and answer.shape == shape:
        return answer
    expected = f"one that answers a {problem} problem by a real array of shape {list(shape)}"
    raise ParameterError("solver", expected, describe_answer(found))
