from __future__ import annotations

import pickle

import pytest

from jdcore import errors

EXAMPLES = [
    errors.ParameterError("c", ">= 0", -1.0, "Give a radius."),
    errors.ParameterTypeError("c", "a real number", "'a'"),
    errors.UnknownNameError("a", "aggregator", ["b"], ["b", "c"], "Hint."),
    errors.MissingMethodError("UPGrad", "aggregator"),
    errors.AmbiguousNameError("a", "aggregator", ["x:a", "y:a"]),
    errors.PluginError("x (y)", "it is broken."),
    errors.NonFiniteError([0, 2]),
    errors.NonDifferentiableError("UPGrad()"),
    errors.GraphError("keys are missing"),
    errors.UnsolvedWarning("dual_cone", 1e-3, "its solver stopped early"),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda e: type(e).__name__)
def test_every_exception_crosses_process_borders_with_its_parts(error: Exception) -> None:
    copy = pickle.loads(pickle.dumps(error))

    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert copy.__dict__ == error.__dict__


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_is_also_a_builtin_one(name: str) -> None:
    cls = getattr(errors, name)
    builtins = [b for b in cls.__mro__ if b.__module__ == "builtins"]

    assert cls.__doc__
    if name == "JDCoreError":
        return
    assert builtins[0] not in (Exception, BaseException, object)


def test_the_grammar_of_a_parameter_error() -> None:
    assert str(EXAMPLES[0]) == "Parameter `c` must be >= 0, got -1.0. Give a radius."
