from __future__ import annotations

import os
import re
import sys
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import Distribution, DistributionFinder, EntryPoint, PackageNotFoundError
from typing import Any, TypeVar

import pluggy
from attrs import evolve, frozen

from jdcore import hooks
from jdcore.errors import ParameterError, ParameterTypeError, line_of, message_of
from jdcore.hooks import ENTRY_POINT_GROUP
from jdcore.spec import (
    AggregatorSpec,
    GramianRuleSpec,
    ScalarizerSpec,
    SolverSpec,
    normalize_name,
)

T = TypeVar("T")


@frozen(kw_only=True)
class PluginRecord:
    """
    What became of one entry point.

    :param distribution: Name of the distribution, e.g. ``"jdplugins-standard"``.
    :param version: Its version; empty if its metadata does not tell.
    :param entry_point: Name of the entry point.
    :param aggregators: The methods it provides; empty unless everything about it was valid.
    :param solvers: The solver backends it provides, likewise.
    :param scalarizers: The scalarizers it provides, likewise.
    :param gramian_rules: The operations it knows closed forms for, likewise.
    :param disabled: The environment variable that switched it off, or None.
    :param pending: Whether its module was being imported when somebody asked; a later look-up
        loads it.
    :param error: What went wrong, or None.
    :param traceback: The formatted traceback of ``error``, or None.
    """

    distribution: str
    version: str
    entry_point: str
    aggregators: tuple[AggregatorSpec, ...] = ()
    solvers: tuple[SolverSpec, ...] = ()
    scalarizers: tuple[ScalarizerSpec, ...] = ()
    gramian_rules: tuple[GramianRuleSpec, ...] = ()
    disabled: str | None = None
    pending: bool = False
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
        if self.pending:
            return "it is being imported at this moment."
        if self.error is None:
            return ""
        return line_of(self.error)


@frozen
class Kind:
    """
    What is found by its name alone: aggregators or scalarizers.

    :param word: What messages call one.
    :param spec: The class of its specs.
    """

    word: str
    spec: type[AggregatorSpec] | type[ScalarizerSpec]

    def specs_of(self, record: PluginRecord) -> tuple[Any, ...]:
        """The specs of this kind among those of a plugin."""
        specs: tuple[Any, ...] = getattr(record, f"{self.word}s")
        return specs


AGGREGATOR = Kind("aggregator", AggregatorSpec)
SCALARIZER = Kind("scalarizer", ScalarizerSpec)
KINDS = (AGGREGATOR, SCALARIZER)


@frozen(kw_only=True, eq=False)
class Plugin:
    """
    An installed entry point, before anything of it is imported.

    :param record: Its names; what becomes of it is filled in by :func:`load`.
    :param point: The entry point, or None if it cannot be read.
    """

    record: PluginRecord
    point: EntryPoint | None


def normalize_distribution(name: str) -> str:
    """Name of a distribution in the form in which PyPI compares names."""
    return re.sub(r"[-_.]+", "-", name).lower()


# -- what is installed -----------------------------------------------------------------------------


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return Distribution.from_name(distribution).version
    except PackageNotFoundError:
        return None


def installed_plugins() -> list[Plugin]:
    """
    Every entry point of the group, in an order that never changes.

    Not by ``importlib.metadata.entry_points``: it raises as a whole when the metadata of any one
    distribution cannot be read, whether or not that one has to do with jdcore.
    """
    found: dict[str, list[Plugin]] = {}
    for distribution in _distributions():
        plugins = _plugins_of(distribution)
        if plugins:  # a distribution found twice counts where Python would import it from
            found.setdefault(plugins[0].record.distribution, plugins)
    plugins = [plugin for plugins in found.values() for plugin in plugins]
    return sorted(plugins, key=lambda p: (p.record.distribution, p.record.entry_point))


def _distributions() -> Iterator[Distribution]:
    # One finder at a time: that of some editable installation may raise, which must not hide what
    # the other finders see.
    for finder in sys.meta_path:
        find = getattr(finder, "find_distributions", None)
        if find is None:
            continue
        try:
            yield from find(DistributionFinder.Context())
        except Exception:
            continue  # nothing of jdcore is known there, so there is nothing to report


def _plugins_of(distribution: Distribution) -> list[Plugin]:
    try:
        points = [p for p in distribution.entry_points if p.group == ENTRY_POINT_GROUP]
    except Exception as error:
        if not _mentions_plugins(distribution, error):
            return []
        name = _name_of(distribution) or "unknown"
        record = _record(name, _version_of(distribution), "entry_points.txt")
        return [Plugin(record=_failed(record, error), point=None)]
    if not points:
        return []
    # The top-level package is the best guess for a distribution without a name.
    name = _name_of(distribution) or points[0].value.partition(":")[0].partition(".")[0]
    version = _version_of(distribution)
    return [Plugin(record=_record(name, version, p.name), point=p) for p in points]


def _mentions_plugins(distribution: Distribution, error: Exception) -> bool:
    """Whether entry points that cannot be read are those of a plugin."""
    if isinstance(error, UnicodeDecodeError):
        return ENTRY_POINT_GROUP.encode() in error.object
    try:
        return ENTRY_POINT_GROUP in (distribution.read_text("entry_points.txt") or "")
    except Exception:
        return False


def _name_of(distribution: Distribution) -> str | None:
    return _metadata(distribution, "Name")


def _version_of(distribution: Distribution) -> str:
    return _metadata(distribution, "Version") or ""


def _metadata(distribution: Distribution, key: str) -> str | None:
    # Absent metadata is None, a KeyError or an AttributeError, depending on the version of Python.
    try:
        metadata = distribution.metadata
        return str(metadata[key]) if key in metadata else None
    except Exception:
        return None


def _record(distribution: str, version: str, entry_point: str) -> PluginRecord:
    return PluginRecord(
        distribution=normalize_distribution(distribution), version=version, entry_point=entry_point
    )


# -- switches --------------------------------------------------------------------------------------


def switched_without_effect(records: Sequence[PluginRecord]) -> list[str]:
    """Names in the off switches that no installed plugin has, most likely misspelt."""
    variables = ("JDCORE_PLUGINS", "JDCORE_DISABLE_PLUGINS")
    switched = set[str]().union(*(_listed(os.environ.get(v, "")) for v in variables))
    return sorted(switched.difference(*(_names(record) for record in records)))


def _names(record: PluginRecord) -> set[str]:
    return {record.distribution, normalize_distribution(record.entry_point)}


def _switched_off_by(names: set[str]) -> str | None:
    # Unset means all plugins, and empty means none.
    allowed = os.environ.get("JDCORE_PLUGINS")
    if allowed is not None and not names & _listed(allowed):
        return "JDCORE_PLUGINS"
    if names & _listed(os.environ.get("JDCORE_DISABLE_PLUGINS", "")):
        return "JDCORE_DISABLE_PLUGINS"
    return None


def _listed(value: str) -> set[str]:
    return {normalize_distribution(name.strip()) for name in value.split(",") if name.strip()}


# -- loading one -----------------------------------------------------------------------------------


def load(plugin: Plugin) -> PluginRecord:
    """Import a plugin and call its hooks, unless it is switched off; whatever it does is told."""
    record = plugin.record
    switch = _switched_off_by(_names(record))
    if switch is not None:
        return evolve(record, disabled=switch, error=None, traceback=None)
    # Its entry points could not be read: the record has the reason already.
    if plugin.point is None:
        return record
    try:
        # What Python's own error calls "'NoneType' object has no attribute 'group'".
        if not EntryPoint.pattern.match(plugin.point.value):
            expected = "a module, or 'module:attribute'"
            raise ParameterError("entry point", expected, repr(plugin.point.value))
        found = evolve(record, **_specs_of(plugin.point.load()))
        _refuse_duplicates(_claims(found))
        return found
    except KeyboardInterrupt:  # the user's, who wants the program to stop
        raise
    # A plugin may raise anything on import, also leave through sys.exit(), pytest.skip() or a
    # cancelled task: none of it may reach the program that merely looks up another method.
    except BaseException as error:
        return _failed(record, error)


def _failed(record: PluginRecord, error: BaseException) -> PluginRecord:
    try:
        text = "".join(traceback.format_exception(error))
    except Exception:  # an exception may break even its own display
        text = f"{type(error).__name__}: {message_of(error)}\n"
    return evolve(record, error=error, traceback=text)


def _specs_of(plugin: object) -> dict[str, Any]:
    # One manager per plugin: pluggy calls the hook of all plugins at once and stops at the first
    # that raises, which would let one plugin take down the others.
    manager = pluggy.PluginManager("jdcore")
    manager.add_hookspecs(hooks)
    manager.register(plugin)
    # Pluggy takes a function of an unknown name for a hook that somebody else declares later, so
    # a misspelt hook would be left out in silence.
    manager.check_pending()
    if not manager.get_hookcallers(plugin):
        raise ParameterTypeError(
            "plugin",
            "an object that implements a hook of jdcore",
            f"{plugin!r} without one",
            "Decorate its hook functions with @jdcore.hookimpl.",
        )
    aggregators = _collect(manager.hook.jdcore_aggregators, AggregatorSpec)
    solvers = _collect(manager.hook.jdcore_solvers, SolverSpec)
    scalarizers = _collect(manager.hook.jdcore_scalarizers, ScalarizerSpec)
    rules = _collect(manager.hook.jdcore_gramian_rules, GramianRuleSpec)
    return {
        "aggregators": aggregators,
        "solvers": solvers,
        "scalarizers": scalarizers,
        "gramian_rules": rules,
    }


def _collect(hook: pluggy.HookCaller, kind: type[T]) -> tuple[T, ...]:
    results = hook()
    # Pluggy drops None in silence, which a function gives that forgets to return its specs.
    results += [None] * (len(hook.get_hookimpls()) - len(results))
    for result in results:
        if not isinstance(result, Iterable):
            expected = "a function that yields specs, or returns a list of them"
            returned = "None" if result is None else f"an object of type {type(result).__name__}"
            raise ParameterTypeError(hook.name, expected, f"one that returns {returned}")
    # Hooks may be generators, whose code runs only now: inside of the guard of `load`.
    specs = [spec for result in results for spec in result]
    for spec in specs:
        if not isinstance(spec, kind):
            raise ParameterTypeError("spec", f"an instance of {kind.__name__}", repr(spec))
    return tuple(specs)


def names_of(spec: AggregatorSpec | ScalarizerSpec) -> tuple[str, ...]:
    """All names a method or scalarizer is found under."""
    return (spec.name, *spec.aliases)


def _claims(record: PluginRecord) -> list[tuple[str, str]]:
    """All names by which the specs of a plugin are found, each with what kind of name it is."""
    methods = [
        (kind.word, normalize_name(name))
        for kind in KINDS
        for spec in kind.specs_of(record)
        for name in names_of(spec)
    ]
    solvers = [("solver", f"{s.problem}/{normalize_name(s.name)}") for s in record.solvers]
    rules = [("Gramian rule", normalize_name(rule.name)) for rule in record.gramian_rules]
    return methods + solvers + rules + [("operation", r.operation) for r in record.gramian_rules]


def _refuse_duplicates(claims: list[tuple[str, str]]) -> None:
    # Within a plugin, two specs of one name are a mistake of its author and fail it as a whole.
    # Between distributions they are nobody's mistake: both stay, under qualified names.
    for (_, name), count in Counter(claims).items():
        if count > 1:
            raise ParameterTypeError("specs", "of different names", f"the name {name!r} twice")


def without_doubles(records: Iterable[PluginRecord]) -> tuple[PluginRecord, ...]:
    """
    The records, where a plugin fails that claims what an earlier one of its distribution has.

    A distribution may have several entry points, and a qualified name is to mean one thing.
    """
    owners: dict[tuple[str, tuple[str, str]], str] = {}
    found = []
    for record in records:
        claims = [(record.distribution, claim) for claim in _claims(record)]
        doubled = [claim for claim in claims if claim in owners]
        if doubled:
            record = _doubled(record, doubled[0][1], owners[doubled[0]])
        else:
            owners.update(dict.fromkeys(claims, record.entry_point))
        found.append(record)
    return tuple(found)


def _doubled(record: PluginRecord, claim: tuple[str, str], owner: str) -> PluginRecord:
    bare = evolve(record, aggregators=(), solvers=(), scalarizers=(), gramian_rules=())
    error = ParameterTypeError(
        "specs",
        "of names that no other entry point of the distribution has",
        f"the {claim[0]} {claim[1]!r}, which {owner!r} has",
    )
    return _failed(bare, error)
