from __future__ import annotations

import numbers
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from jdcore._discovery import AGGREGATOR, SCALARIZER
from jdcore._methods import (
    ComposedAggregator,
    aggregator_class,
    is_composed,
    scalarizer_class,
    weighting_class,
)
from jdcore._registry import registry
from jdcore.aggregation._mixing import MixedWeighting
from jdcore.config._arguments import ADAPTERS, Argument, arguments_of
from jdcore.config._tensors import write_tensor
from jdcore.errors import ParameterError, ParameterTypeError
from jdcore.spec import normalize_name

_DATA = "data: a number, string, boolean, None, list, mapping, Tensor or registered method"


def write(method: Any, path: str, omit: Collection[str] = ()) -> dict[str, Any]:
    """See :func:`jdcore.to_config`."""
    if isinstance(method, MixedWeighting):
        method = method.mixing
    name = _name_of(method)
    if name is None:
        expected = "an instance of a registered aggregator, weighting or scalarizer"
        hint = "Give what it wraps: module.wrapped." if hasattr(method, "wrapped") else None
        raise ParameterTypeError(path, expected, repr(method), hint)
    # A composed aggregator has the arguments of its weighting, which keeps them.
    owner = method.weighting if isinstance(method, ComposedAggregator) else method
    arguments = arguments_of(type(owner))
    _refuse_unknown(omit, arguments, name)
    return {"name": name} | {
        argument.name: _value(argument, owner, f"{path}.{argument.name}")
        for argument in arguments.values()
        if argument.name not in omit and not _is_default(argument, owner)
    }


def _refuse_unknown(omit: Collection[str], arguments: Collection[str], name: str) -> None:
    for argument in omit:
        if argument not in arguments:
            known = ", ".join(arguments) or "none"
            raise ParameterError("omit", f"arguments of {name!r} ({known})", repr(argument))


def _is_default(argument: Argument, owner: Any) -> bool:
    value = argument.of(owner)
    if value is argument.default:
        return True
    if type(value) is not type(argument.default):  # since 1 == True == 1.0
        return False
    try:
        return bool(value == argument.default)
    except Exception:  # tensors and arrays compare by entry, also within lists
        return False


def _value(argument: Argument, owner: Any, path: str) -> Any:
    value = argument.of(owner)
    solver = None if argument.problem is None else _solver(argument.problem, value, path)
    return _plain(value, path) if solver is None else solver


def _solver(problem: str, solver: Any, path: str) -> dict[str, Any] | None:
    """A solver that was given as an object, if it is one of a registered backend."""
    for name in registry.solvers(problem):
        entry, _ = registry.solver(problem, name)
        # Comparing names first, so that no other solver is imported.
        same_name = entry.spec.factory.endswith(f":{type(solver).__name__}")
        if same_name and registry.solver_class(entry) is type(solver):
            arguments = [
                a for a in arguments_of(type(solver)).values() if not _is_default(a, solver)
            ]
            return {"name": name} | {
                a.name: _value(a, solver, f"{path}.{a.name}") for a in arguments
            }
    return None


def _plain(value: Any, path: str) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, numbers.Integral):  # those of numpy, which arguments may be, are no data
        return int(value)
    if isinstance(value, Tensor):
        return write_tensor(value, path)
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{path}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):  # JSON would make a string of it, maybe one that is there
                raise ParameterTypeError(path, "a mapping whose keys are strings", repr(key))
        return {key: _plain(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, MixedWeighting) or _name_of(value) is not None:
        return write(value, path)
    raise ParameterTypeError(path, _DATA, repr(value), _hint(path))


def _hint(path: str) -> str | None:
    root, _, argument = path.partition(".")
    # Only arguments of the outermost method can be given beside a configuration.
    if "." in argument or "[" in argument:
        return None
    return (
        f"Leave it out, to_config(..., omit=[{argument!r}]), and give it again when building: "
        f"get_aggregator({root}, {argument}=...)."
    )


def _name_of(method: Any) -> str | None:
    """The name to find the class of an object under; None if it is not registered."""
    cls = type(method)
    for adapter, adapter_class in ADAPTERS.items():
        if cls is adapter_class:
            return adapter
    found = (_listed(entry) for entry in registry.entries(AGGREGATOR) if _makes(entry, cls))
    return next(found, None) or _scalarizer_of(cls)


def _scalarizer_of(cls: type) -> str | None:
    for name in registry.names(SCALARIZER):
        # Comparing names first, so that no other scalarizer is imported.
        same_name = registry.entry(SCALARIZER, name).spec.class_name == cls.__name__
        if same_name and scalarizer_class(name) is cls:
            return name
    return None


def _makes(entry: Any, cls: Any) -> bool:
    if is_composed(cls):  # by name: composed classes are made anew by refresh()
        return bool(entry.qualified_name == cls.qualified_name)
    if entry.spec.class_name != cls.__name__.removesuffix("Weighting"):
        return False  # so that no other method is imported
    found = weighting_class if entry.spec.weighting else aggregator_class
    return found(entry.qualified_name) is cls


def _listed(entry: Any) -> str:
    reserved = normalize_name(entry.spec.name) in map(normalize_name, ADAPTERS)
    plain = entry.spec.name in registry.names(AGGREGATOR) and not reserved
    return str(entry.spec.name if plain else entry.qualified_name)
