from __future__ import annotations

import os
import re
import traceback
from collections.abc import Iterable, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

import pluggy
from attrs import evolve, frozen

from jdcore import hooks
from jdcore.errors import ParameterTypeError
from jdcore.hooks import ENTRY_POINT_GROUP
from jdcore.spec import AggregatorSpec, GramianRuleSpec, SolverSpec, normalize_name

T = TypeVar("T")


@frozen(kw_only=True)
class PluginRecord:
    """
    What became of one entry point.

    :param distribution: Name of the distribution, e.g. ``"jdplugins-standard"``.
    :param version: Its version.
    :param entry_point: Name of the entry point.
    :param aggregators: The methods it provides; empty unless everything about it was valid.
    :param solvers: The solver backends it provides, likewise.
    :param gramian_rules: The layers it knows closed forms for, likewise.
    :param disabled: The environment variable that switched it off, or None.
    :param error: What went wrong, or None.
    :param traceback: The formatted traceback of ``error``, or None.
    """

    distribution: str
    version: str
    entry_point: str
    aggregators: tuple[AggregatorSpec, ...] = ()
    solvers: tuple[SolverSpec, ...] = ()
    gramian_rules: tuple[GramianRuleSpec, ...] = ()
    disabled: str | None = None
    error: BaseException | None = None
    traceback: str | None = None

    @property
    def label(self) -> str:
        """How messages call this plugin."""
        return f"{self.distribution} ({self.entry_point})"

    @property
    def reason(self) -> str:
        """Why this plugin provides nothing, one sentence; empty if it is fine."""
        if self.disabled is not None:
            return f"it is switched off by {self.disabled}."
        return "" if self.error is None else f"{type(self.error).__name__}: {self.error}"


def normalize_distribution(name: str) -> str:
    """Name of a distribution in the form in which PyPI compares names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def discover() -> list[PluginRecord]:
    """Load every plugin that is installed and not switched off, in an order that never changes."""
    points = entry_points(group=ENTRY_POINT_GROUP)
    return [_load(point) for point in sorted(points, key=lambda p: (_distribution(p), p.name))]


def _distribution(point: EntryPoint) -> str:
    return normalize_distribution(point.dist.name) if point.dist is not None else "unknown"


def _load(point: EntryPoint) -> PluginRecord:
    record = PluginRecord(
        distribution=_distribution(point),
        version=point.dist.version if point.dist is not None else "",
        entry_point=point.name,
    )
    switch = _switched_off_by(_names(record))
    if switch is not None:
        return evolve(record, disabled=switch)
    try:
        provided = _specs_of(point.load())
    # A plugin may do anything on import, also leave through sys.exit(): none of it may reach the
    # program that merely looks up another method.
    except (Exception, SystemExit) as error:
        return evolve(record, error=error, traceback=traceback.format_exc())
    return evolve(record, **provided)


def switched_without_effect(records: Sequence[PluginRecord]) -> list[str]:
    """Names in the off switches that no installed plugin has, most likely misspelt."""
    variables = ("JDCORE_PLUGINS", "JDCORE_DISABLE_PLUGINS")
    switched = set[str]().union(*(_listed(os.environ.get(v, "")) for v in variables))
    return sorted(switched.difference(*(_names(record) for record in records)))


def _names(record: PluginRecord) -> set[str]:
    return {record.distribution, normalize_distribution(record.entry_point)}


def _switched_off_by(names: set[str]) -> str | None:
    allowed = os.environ.get("JDCORE_PLUGINS")
    if allowed is not None and not names & _listed(allowed):
        return "JDCORE_PLUGINS"
    if names & _listed(os.environ.get("JDCORE_DISABLE_PLUGINS", "")):
        return "JDCORE_DISABLE_PLUGINS"
    return None


def _listed(value: str) -> set[str]:
    return {normalize_distribution(name.strip()) for name in value.split(",") if name.strip()}


def _specs_of(plugin: object) -> dict[str, Any]:
    # One manager per plugin: pluggy calls the hook of all plugins at once and stops at the first
    # that raises, which would let one plugin take down the others.
    manager = pluggy.PluginManager("jdcore")
    manager.add_hookspecs(hooks)
    manager.register(plugin)
    manager.check_pending()
    if not manager.get_hookcallers(plugin):
        raise ParameterTypeError(
            "plugin",
            "an object that implements a hook of jdcore",
            f"{plugin!r} without one",
            "Decorate its hook functions with @jdcore.hookimpl.",
        )
    aggregators = _collect(manager.hook.jdcore_aggregators(), AggregatorSpec)
    solvers = _collect(manager.hook.jdcore_solvers(), SolverSpec)
    rules = _collect(manager.hook.jdcore_gramian_rules(), GramianRuleSpec)
    _refuse_duplicates([normalize_name(n) for spec in aggregators for n in names_of(spec)])
    _refuse_duplicates([f"{spec.problem}/{normalize_name(spec.name)}" for spec in solvers])
    _refuse_duplicates([spec.layer for spec in rules])
    return {"aggregators": aggregators, "solvers": solvers, "gramian_rules": rules}


def _collect(results: Sequence[Iterable[Any]], kind: type[T]) -> tuple[T, ...]:
    specs = [spec for result in results for spec in result]
    for spec in specs:
        if not isinstance(spec, kind):
            raise ParameterTypeError("spec", f"an instance of {kind.__name__}", repr(spec))
    return tuple(specs)


def names_of(spec: AggregatorSpec) -> tuple[str, ...]:
    """All names a method is found under."""
    return (spec.name, *spec.aliases)


def _refuse_duplicates(names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ParameterTypeError("specs", "of different names", f"the name {name!r} twice")
