from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

from attrs import Attribute, field

from jdcore._registry import shared_solver
from jdcore.errors import ParameterTypeError


def solver_field(problem: str, *, default: str | None = "native") -> Any:
    """
    The attrs field ``solver`` of a method that poses a problem (or ``fallback`` of a solver).

    It takes the name of a registered backend or an object with the call of the problem's protocol.
    A name that is not registered, and an object that is not called as the default backend is, are
    refused on construction and on every later set; it is the name that is kept, shown and pickled.
    Use with :func:`find_solver`.

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
            names = signature(find_solver(problem, default)).parameters
            if _takes(solver, len(names)):
                return
            hint = f"It is called as solver({', '.join(names)})."
        expected = f"the name of a {problem} solver or such a solver"
        raise ParameterTypeError(attribute.name, expected, repr(value), hint)

    metadata = {"jdcore.problem": problem}  # for those who list the solvers of a method
    return field(default=default, kw_only=True, validator=validate, metadata=metadata)


def _takes(solver: Callable[..., Any], count: int) -> bool:
    """Whether a solver takes so many arguments by position."""
    try:
        signature(solver).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:  # a function of another language, which does not tell
        return True
    return True


def find_solver(problem: str, solver: Any) -> Any:
    """
    The solver a ``solver`` field stands for: the object itself, or the backend of that name.

    :raises UnknownNameError: If no backend for this problem has the name.
    :raises PluginError: If the backend cannot be loaded.
    """
    # Looked up at each call, so that a solver that is registered anew is used from then on.
    return shared_solver(problem, solver) if isinstance(solver, str) else solver
