"""
Discovery and look-up of methods and solvers.

``import jdcore`` reads no metadata. The first look-up discovers all plugins once, each in
isolation: it is loaded, its own hooks are called, what they yield is validated, and all of its
specs are committed or none. What fails is recorded and reported in one warning; an explicit request
for it raises.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jdcore._discovery import AGGREGATOR, SCALARIZER, PluginRecord
from jdcore._registry import construct, get_solver, registry
from jdcore.spec import AggregatorSpec, GramianRuleSpec, ScalarizerSpec

__all__ = [
    "describe",
    "describe_scalarizer",
    "get_aggregator",
    "get_scalarizer",
    "get_solver",
    "get_weighting",
    "list_aggregators",
    "list_plugins",
    "list_scalarizers",
    "list_solvers",
    "refresh",
    "register",
]


def get_aggregator(name: str | Mapping[str, Any], /, **arguments: Any) -> Any:
    """
    Make an aggregator by name, or from a configuration (see :mod:`jdcore.config`).

    :param name: Name in any spelling ("upgrad", "UPGrad"), or ``"distribution:name"``; or a mapping
        with the name under the key ``name`` and arguments as plain data.
    :param arguments: Arguments of the method, e.g. ``pref_vector``; see ``help()`` of its class.
    :returns: An :class:`~jdcore.Aggregator`.
    :raises UnknownNameError: If there is no such method; the message says what is near, what is
        registered and, where known, what to install.
    :raises AmbiguousNameError: If several distributions claim the plain name.
    :raises PluginError: If the plugin that provides it failed; the cause is chained.
    :raises ParameterError: If an argument is unknown to the method or has an unusable value; in a
        configuration, its path is named.

    >>> import torch, jdcore
    >>> jdcore.get_aggregator("upgrad")(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
    tensor([0.2924, 1.9006, 1.9006])
    """
    if isinstance(name, Mapping):
        return _read_config(name, "aggregator", arguments)
    from jdcore import _methods  # imports torch, which listing does without

    return construct(_methods.aggregator_class(name), name, arguments)


def get_weighting(name: str | Mapping[str, Any], /, **arguments: Any) -> Any:
    """
    Make a weighting by name or from a configuration. Parameters and errors as
    :func:`get_aggregator`.

    :returns: A :class:`~jdcore.Weighting`.
    :raises ParameterError: Also if the method's update is not a function of the Gramian.
    """
    if isinstance(name, Mapping):
        return _read_config(name, "weighting", arguments)
    from jdcore import _methods

    return construct(_methods.weighting_class(name), name, arguments)


def get_scalarizer(name: str | Mapping[str, Any], /, **arguments: Any) -> Any:
    """
    Make a scalarizer, which makes one loss of several without any Jacobian.

    Parameters and errors as :func:`get_aggregator`.

    :returns: A :class:`~jdcore.Scalarizer`. Parameters of trainable ones go to the optimizer.

    >>> import torch, jdcore
    >>> jdcore.get_scalarizer("geometric_mean")(torch.tensor([1.0, 4.0]))
    tensor(2.)
    """
    if isinstance(name, Mapping):
        return _read_config(name, "scalarizer", arguments)
    from jdcore import _methods  # imports torch, which listing does without

    return construct(_methods.scalarizer_class(name), name, arguments)


def _read_config(config: Mapping[str, Any], kind: str, arguments: Mapping[str, Any]) -> Any:
    from jdcore.config._read import read  # imports torch and, for look-ups, this module

    return read(config, kind=kind, extra=arguments)


def list_aggregators() -> tuple[str, ...]:
    """Names of all usable methods, sorted; qualified where two distributions claim a name."""
    return tuple(registry.names(AGGREGATOR))


def describe(name: str, /) -> AggregatorSpec:
    """The spec of a method, without importing it. Errors as :func:`get_aggregator`."""
    spec: AggregatorSpec = registry.entry(AGGREGATOR, name).spec
    return spec


def list_scalarizers() -> tuple[str, ...]:
    """Names of all usable scalarizers, as :func:`list_aggregators`."""
    return tuple(registry.names(SCALARIZER))


def describe_scalarizer(name: str, /) -> ScalarizerSpec:
    """The spec of a scalarizer, without importing it. Errors as :func:`get_aggregator`."""
    spec: ScalarizerSpec = registry.entry(SCALARIZER, name).spec
    return spec


def list_plugins() -> tuple[PluginRecord, ...]:
    """What became of every installed plugin: what it provides, or why it is left out."""
    return registry.records()


def register(spec: AggregatorSpec | ScalarizerSpec | GramianRuleSpec, /) -> None:
    """
    Add a method, a scalarizer or a Gramian rule without a distribution, for notebooks and tests.

    A later registration of the same name replaces an earlier one. In a notebook the factory is
    ``"__main__:MyWeighting"``.

    Where several installed distributions claim one operation, and so disable each other,
    registering a rule for it is the choice between them; their specs are in :func:`list_plugins`.

    :raises ParameterTypeError: If ``spec`` is none of these.
    :raises ParameterError: If an installed plugin already provides one of its names, or a rule for
        its operation.
    """
    registry.register(spec)


def refresh() -> None:
    """Discover again at the next look-up, e.g. after an installation. Registered specs stay."""
    registry.refresh()


def list_solvers(problem: str | None = None) -> dict[str, tuple[str, ...]]:
    """Names of the solver backends by problem, or of one problem only."""
    problems = registry.problems() if problem is None else [problem]
    return {p: tuple(registry.solvers(p)) for p in problems}
