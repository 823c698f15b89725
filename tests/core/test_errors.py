from __future__ import annotations

import ast
import pickle
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from jdcore import errors
from jdcore.autojac import _vmap, backward
from jdcore.errors import JDCoreWarning, VectorizationWarning

ROOT = Path(__file__).parents[2]

EXAMPLES = [
    errors.ParameterError("c", ">= 0", -1.0, "Give a radius."),
    errors.ParameterTypeError("c", "a real number", "'a'"),
    errors.UnknownNameError("a", "aggregator", ["b"], ["b", "c"], "Hint."),
    errors.MissingMethodError("UPGrad", "aggregator"),
    errors.MissingPackageError(["pandas", "matplotlib"], "pip install pandas matplotlib"),
    errors.AmbiguousNameError("a", "aggregator", ["x:a", "y:a"]),
    errors.PluginError("x (y)", "it is broken."),
    errors.NonFiniteError([0, 2]),
    errors.NonDifferentiableError("UPGrad()"),
    errors.TransformError("keys are missing"),
    errors.VectorizationError("aten::sort cannot be batched."),
    errors.SinglePassError("its memory is reused", "Set a switch."),
    errors.PeerError(3, "it ran out of data"),
    errors.PeerError(None, "their shapes differ"),
    errors.UnservedGraphError("a layer", "it mixes", "Leave it out.", "batch_dim", "None"),
    errors.UnservedGraphError("a norm", "it mixes", "Drop it.", layer="a.b", where="in a.b"),
    errors.JDCoreWarning("something"),
    errors.PluginWarning("a plugin failed"),
    errors.RowByRowWarning(3, "a tensor has a hook"),
    errors.VectorizationWarning("aten::sort cannot be batched."),
    errors.UnsolvedWarning("dual_cone", 1e-3, "its solver stopped early"),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda e: type(e).__name__)
def test_every_exception_crosses_process_borders_with_its_parts(error: Exception) -> None:
    copy = pickle.loads(pickle.dumps(error))

    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert copy.__dict__ == error.__dict__


def test_every_exception_is_among_the_examples() -> None:
    assert {type(example).__name__ for example in EXAMPLES} == {*errors.__all__} - {
        "JDCoreError",
        "GraphError",
        "warn",
    }


def test_errors_of_the_graph_are_one_class_with_a_remedy() -> None:
    of_graph = [error for error in EXAMPLES if isinstance(error, errors.GraphError)]
    names = {type(error).__name__ for error in of_graph}
    assert names == {"SinglePassError", "UnservedGraphError", "VectorizationError"}
    assert all(error.remedy in str(error) for error in of_graph)
    assert {error.layer for error in of_graph} == {None, "a.b"}


def test_nothing_raises_the_base_class() -> None:
    for path in sorted(ROOT.glob("jdcore/**/*.py")) + sorted(ROOT.glob("jdplugins/*/src/**/*.py")):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"raise (JDCore|Graph)Error\(", text), path


def test_functions_that_are_called_refuse_raise() -> None:
    for path in sorted(ROOT.glob("jdcore/**/*.py")) + sorted(ROOT.glob("jdplugins/*/src/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.lstrip("_").startswith("refuse_"):
                assert ast.unparse(node.returns or node) in ("None", "NoReturn"), (path, node.name)


@pytest.mark.parametrize("name", [name for name in errors.__all__ if name != "warn"])
def test_every_error_is_also_a_builtin_one(name: str) -> None:
    cls = getattr(errors, name)
    builtins = [b for b in cls.__mro__ if b.__module__ == "builtins"]

    assert cls.__doc__
    if name == "JDCoreError":
        return
    assert builtins[0] not in (Exception, BaseException, object)


def test_the_grammar_of_a_parameter_error() -> None:
    assert str(EXAMPLES[0]) == "Parameter `c` must be >= 0, got -1.0. Give a radius."


# -- where warnings point --------------------------------------------------------------------------


def test_a_warning_of_the_core_points_at_the_line_that_called_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("Batching rule not implemented for aten::fancy.")

    a = torch.ones(3, requires_grad=True)
    monkeypatch.setattr("jdcore.autojac._problem.batched_gradients", fail)
    _vmap._WORKED.clear()
    _vmap._FAILED.clear()
    with pytest.warns(VectorizationWarning) as caught:
        backward(a.sin())
    _vmap._FAILED.clear()
    assert caught[0].filename == __file__


_PLUGIN = """
from functools import cached_property
import numpy as np
import torch
from jdcore.errors import JDCoreWarning, warn

@torch.no_grad()
@np.errstate(all="ignore")
def inner():
    warn(JDCoreWarning("x"))

class Weighting:
    @cached_property
    def weights(self):
        inner()

def __getattr__(name):
    if name == "Method":
        Weighting().weights
    return name
"""


def test_a_warning_of_a_plugin_of_any_name_points_past_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "somebody", somebody := ModuleType("somebody"))
    exec(_PLUGIN, vars(somebody))
    with pytest.warns(JDCoreWarning, match="x") as caught:
        from somebody import Method  # type: ignore[import-not-found]  # noqa: F401
    assert caught[0].filename == __file__


def test_nothing_warns_but_by_the_helper_that_finds_the_line() -> None:
    root = Path(__file__).parents[2]
    sources = [*root.glob("jdcore/**/*.py"), *root.glob("jdplugins/*/src/**/*.py")]
    warning = [path.name for path in sources if "warnings.warn" in path.read_text("utf-8")]
    assert warning == ["errors.py"]
