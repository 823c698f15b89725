from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from jdcore._methods import aggregator_class, mixes_rows, scalarizer_class, weighting_class
from jdcore._registry import construct, get_solver
from jdcore.aggregation._weigh import as_weighting
from jdcore.config._arguments import ADAPTERS, Argument, arguments_of
from jdcore.config._tensors import read_tensor
from jdcore.errors import ParameterError, ParameterTypeError, UnknownNameError
from jdcore.spec import normalize_name


def read(
    config: Any, *, kind: str, path: str = "config", extra: Mapping[str, Any] | None = None
) -> Any:
    """
    Build what a configuration describes.

    :param config: The configuration.
    :param kind: ``"aggregator"`` or ``"weighting"``, both of which a Gramian method is under one
        name, or ``"scalarizer"``.
    :param path: Where the configuration stands, for messages.
    :param extra: Arguments, as objects, that take precedence over those of the configuration.
    :raises ParameterError: If a key is unknown or missing, or a value cannot be used.
    :raises UnknownNameError: If a method or solver is not registered.
    """
    name = _name(config, kind, path)
    with _located(path, config):
        cls = _class(name, kind)
    known = arguments_of(cls)
    given = {key: value for key, value in config.items() if key != "name"}
    extra = extra or {}
    keys = {f"{path}.{key}": key for key in given} | {key: key for key in extra}
    _refuse_unknown(keys, known, name)
    values = {k: _value(known[k], v, f"{path}.{k}") for k, v in given.items() if k not in extra}
    # These are objects: there is nothing to read.
    values |= extra
    with _located(path, given):
        made = construct(cls, name, values)
        return as_weighting(made, "aggregator") if kind == "weighting" else made


def _refuse_unknown(keys: Mapping[str, Any], known: Mapping[str, Argument], name: str) -> None:
    """
    Refuse keys that are no arguments.

    :param keys: The keys by the paths that errors name.
    """
    for path, key in keys.items():
        if key not in known:
            expected = f"an argument of {name!r} ({', '.join(known) or 'it takes none'})"
            raise ParameterTypeError(path, expected, "an unknown one")


def _name(config: Any, kind: str, path: str) -> str:
    if not isinstance(config, Mapping):
        expected = f"a mapping with the name of {_a(kind)} under `name`"
        raise ParameterTypeError(path, expected, repr(config))
    if "name" not in config:
        raise ParameterError(f"{path}.name", f"the name of {_a(kind)}", "nothing")
    name = config["name"]
    if not isinstance(name, str):
        raise ParameterTypeError(f"{path}.name", f"the name of {_a(kind)}", repr(name))
    return name


def _a(kind: str) -> str:
    return f"{'an' if kind[0] == 'a' else 'a'} {kind}"


def _class(name: str, kind: str) -> Any:
    if kind == "scalarizer":
        return scalarizer_class(name)
    for adapter, cls in ADAPTERS.items():
        if normalize_name(adapter) == normalize_name(name):
            _refuse_adapter_as(kind, adapter)
            return cls
    # What mixes rows has a weighting, if the method that it wraps has one.
    whole = kind == "aggregator" or mixes_rows(name)
    return aggregator_class(name) if whole else weighting_class(name)


def _refuse_adapter_as(kind: str, adapter: str) -> None:
    made = "aggregator" if adapter.endswith("aggregator") else "weighting"
    if made != kind:
        hint = f"Build it with get_{made}(config)."
        raise ParameterError("name", f"the name of {_a(kind)}", f"{adapter!r}, {_a(made)}", hint)


def _value(argument: Argument, value: Any, path: str) -> Any:
    value = _plain(value, path)
    if isinstance(value, (list, dict)) and argument.accepts("Tensor"):
        return read_tensor(value, path)
    if isinstance(value, dict) and argument.problem is not None:
        return _solver(value, argument.problem, path)
    if isinstance(value, dict) and "name" in value:
        kind = "aggregator" if argument.accepts("Aggregator") else "weighting"
        return read(value, kind=kind, path=path)
    return value


def _solver(config: dict[str, Any], problem: str, path: str) -> Any:
    """A solver with arguments; one without is better written as its name alone."""
    name = _name(config, f"{problem} solver", path)
    arguments = {key: value for key, value in config.items() if key != "name"}
    with _located(path, config):
        return get_solver(problem, name, **arguments)


def _plain(value: Any, path: str) -> Any:
    """
    Lists and dictionaries in place of the containers of OmegaConf, tomlkit and their like.

    :raises ParameterTypeError: If there are bytes, which are a sequence of numbers to Python.
    """
    if isinstance(value, (bytes, bytearray, memoryview)):
        raise ParameterTypeError(path, "numbers, strings, lists or mappings", repr(value))
    try:
        if isinstance(value, Mapping):
            return {key: _plain(item, f"{path}.{key}") for key, item in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, str):
            return [_plain(item, f"{path}[{index}]") for index, item in enumerate(value)]
    except RecursionError:
        # Anchors of YAML can make a list that holds itself.
        raise ParameterError(path, "data that comes to an end", "data within itself") from None
    return value


@contextmanager
def _located(path: str, config: Mapping[str, Any]) -> Iterator[None]:
    """Put the path inside the configuration into the errors of a constructor or a look-up."""
    try:
        yield
    except ParameterError as error:
        cls = ParameterTypeError if isinstance(error, ParameterTypeError) else ParameterError
        parameter = f"{path}.{error.parameter}"
        raise cls(parameter, error.expected, error.got, error.hint) from error
    except UnknownNameError as error:
        named = [key for key in config if str(config[key]).endswith(error.name)]  # or its variant
        key = named[0] if named else "name"
        hint = f"`{path}.{key}` asks for it."
        if error.hint is not None:
            hint = f"{hint} {error.hint}"
        raise UnknownNameError(error.name, error.kind, error.close, error.known, hint) from error
