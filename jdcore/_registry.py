"""What the functions of :mod:`jdcore.registry` are about: one registry per process."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import threading
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from typing import Any, NoReturn

from attrs import frozen

from jdcore._catalogue import distribution_of, solver_names
from jdcore._discovery import (
    KINDS,
    Kind,
    PluginRecord,
    installed_plugins,
    names_of,
    normalize_distribution,
    switched_without_effect,
    without_doubles,
)
from jdcore._environment import switched_on
from jdcore._gramian_rules import CHOOSE, RUNTIME, OperationTable, serves_itself
from jdcore._loading import Loading
from jdcore._tables import Entry, NameTable
from jdcore.errors import (
    ParameterError,
    ParameterTypeError,
    PluginError,
    PluginWarning,
    UnknownNameError,
    message_of,
    warn,
)
from jdcore.spec import (
    AggregatorSpec,
    GramianRuleSpec,
    ScalarizerSpec,
    SolverSpec,
    normalize_name,
)


@frozen(kw_only=True, eq=False)
class _Known:
    """What look-ups see: made as a whole, published at once, never changed."""

    records: tuple[PluginRecord, ...]
    methods: dict[Kind, NameTable]
    solvers: dict[str, NameTable]
    rules: OperationTable

    def solver_table(self, problem: str) -> NameTable:
        # Of a problem that nobody solves, the error is to name the plugins that would.
        return self.solvers.get(problem) or NameTable(f"{problem} solver", problem)

    def complete(self) -> bool:
        return not any(record.pending for record in self.records)

    def failed(self) -> list[PluginRecord]:
        return [record for record in self.records if record.error is not None]

    def clashes(self) -> list[tuple[str, str]]:
        return [
            (" and ".join(claims), f"they claim the same {table.kind} name {name!r}.")
            for table in (*self.methods.values(), *self.solvers.values())
            for name, claims in table.clashes().items()
        ] + [
            (" and ".join(claims), f"they claim the same operation {operation}. {CHOOSE}")
            for operation, claims in self.rules.clashes().items()
        ]


class Registry:
    """
    All that is known of the installed plugins. Thread-safe; one per process is enough.

    Plugins are loaded without the lock (see :mod:`jdcore._loading`); it only guards that what was
    found, and what was registered, is published as a whole.
    """

    def __init__(self) -> None:
        # Taken again by `_tables`, which `_discover` calls with the lock in its hands.
        self._lock = threading.RLock()
        self._runtime: dict[Kind, dict[str, Any]] = {kind: {} for kind in KINDS}
        self._runtime_rules: dict[str, GramianRuleSpec] = {}
        self._forget()

    def _forget(self) -> None:
        self._loading: Loading | None = None
        self._known: _Known | None = None
        self._reported: set[str] = set()
        self._loaded_at_report: int | None = None
        shared_solver.cache_clear()

    # -- discovery ---------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Forget what was discovered; the next look-up discovers again. Registered specs stay."""
        # What was installed since the process began is found as well.
        importlib.invalidate_caches()
        with self._lock:
            self._forget()

    def register(self, spec: AggregatorSpec | ScalarizerSpec | GramianRuleSpec) -> None:
        if isinstance(spec, GramianRuleSpec):
            self._register_rule(spec)
            return
        for kind in KINDS:
            if isinstance(spec, kind.spec):
                self._register_method(spec, kind)
                return
        expected = "an AggregatorSpec, a ScalarizerSpec or a GramianRuleSpec"
        raise ParameterTypeError("spec", expected, repr(spec))

    def _register_method(self, spec: AggregatorSpec | ScalarizerSpec, kind: Kind) -> None:
        # Not under the lock: to discover is to run code of plugins, which may look methods up.
        table = self._discover().methods[kind]
        # All names before any is taken, so that a refused spec leaves nothing behind.
        for name in names_of(spec):
            entry = table.find(name)
            # A cell of a notebook that runs again replaces what it registered.
            if entry is not None and entry.qualified_name != f"{RUNTIME}:{spec.name}":
                raise ParameterError("name", "free", f"{name!r}, taken by {entry.qualified_name}")
        with self._lock:
            self._runtime[kind][spec.name] = spec
            self._known = None  # made anew by the next look-up; no plugin is loaded again

    def _register_rule(self, spec: GramianRuleSpec) -> None:
        claims = self._discover().rules.claims(spec.operation)
        names = [e.qualified_name for e in claims if e.distribution != RUNTIME]
        # Several installed ones have disabled each other: then this is the choice.
        if len(names) == 1 or serves_itself(spec.operation):
            taken = f"{spec.operation!r}, taken by {names[0] if names else 'jdcore'}"
            raise ParameterError("operation", "free", taken)
        with self._lock:
            self._runtime_rules[spec.operation] = spec
            self._known = None

    def _discover(self) -> _Known:
        """
        What is known once every plugin is loaded that can be loaded now.

        :raises PluginError: If plugins have to be fine (``JDCORE_STRICT_PLUGINS``) and one is not.
        """
        known = self._known
        if known is not None and known.complete():
            return known
        loading = self._installed()
        loading.advance()
        # Before anything is published: the next look-up is to raise as well.
        _demand_if_strict(self._tables(loading))
        with self._lock:
            known = self._tables(loading)
            if self._loading is loading:  # and nobody has called for a new discovery meanwhile
                self._known = known
        self._report(known)
        return known

    def _installed(self) -> Loading:
        loading = self._loading
        if loading is None:
            found = Loading(installed_plugins())
            with self._lock:  # the first thread that has looked settles it
                loading = self._loading = self._loading or found
        return loading

    def _tables(self, loading: Loading) -> _Known:
        """The tables of all that is loaded and registered at this moment."""
        with self._lock:
            runtime = {kind: [*self._runtime[kind].values()] for kind in KINDS}
            runtime_rules = [*self._runtime_rules.values()]
            # Read once: a plugin that is loaded meanwhile is in the next tables, as a whole.
            records = without_doubles(loading.records())
        return _Known(
            records=records,
            methods={
                kind: _name_table(
                    kind,
                    [(r.distribution, spec) for r in records for spec in kind.specs_of(r)]
                    + [(RUNTIME, spec) for spec in runtime[kind]],
                )
                for kind in KINDS
            },
            solvers=_solver_tables([(r.distribution, s) for r in records for s in r.solvers]),
            rules=OperationTable(
                [Entry(r.distribution, rule) for r in records for rule in r.gramian_rules]
                + [Entry(RUNTIME, rule) for rule in runtime_rules]
            ),
        )

    def _report(self, known: _Known) -> None:
        """Warn of what is left out, once for every plugin."""
        loaded = sum(not record.pending for record in known.records)
        if loaded == self._loaded_at_report:
            return  # what is registered later is the user's own doing
        self._loaded_at_report = loaded
        troubles = [f"{r.label} failed: {r.reason}" for r in known.failed()]
        troubles += [f"{claims}: {reason}" for claims, reason in known.clashes()]
        troubles += [
            f"{n!r} is switched on or off, but not installed"
            for n in switched_without_effect(known.records)
        ]
        with self._lock:
            new = [trouble for trouble in troubles if trouble not in self._reported]
            self._reported.update(new)
        if new:
            lines = "".join(f"\n- {trouble}" for trouble in new)
            text = f"Some jdcore plugins are left out (see jdcore.list_plugins()):{lines}"
            warn(PluginWarning(text))

    def records(self) -> tuple[PluginRecord, ...]:
        return self._discover().records

    def before_fork(self) -> None:
        if self._loading is not None:
            self._loading.settle()

    def after_fork_in_child(self) -> None:
        self._lock = threading.RLock()  # a thread that is gone may have held the old one
        if self._loading is not None:
            self._loading.inherit()

    # -- look-up -----------------------------------------------------------------------------------

    def entries(self, kind: Kind) -> list[Entry]:
        """All of a kind, by name; also those whose plain name several distributions claim."""
        return list(self._discover().methods[kind])

    def names(self, kind: Kind) -> list[str]:
        """All names of a kind, sorted; qualified where several distributions claim one."""
        return self._discover().methods[kind].listed_names()

    def solvers(self, problem: str) -> list[str]:
        return self._discover().solver_table(problem).listed_names()

    def problems(self) -> list[str]:
        return sorted(self._discover().solvers)

    def entry(self, kind: Kind, name: str) -> Entry:
        """
        The entry under a name.

        :raises ParameterTypeError: If the name is no string.
        :raises AmbiguousNameError: If several distributions claim the plain name.
        :raises PluginError: If the plugin that is known to provide it failed or is switched off.
        :raises UnknownNameError: If there is none of this name.
        """
        if not isinstance(name, str):
            raise ParameterTypeError("name", "a string", repr(name))
        known = self._discover()
        entry = known.methods[kind].find(name)
        if entry is None:
            _raise_unknown(name, known.methods[kind], known)
        return entry

    def solver(self, problem: str, name: str) -> tuple[Entry, str | None]:
        """
        The entry of a solver backend and the variant asked for, from ``"name"``, ``"name:variant"``
        or either after ``"distribution:"``. Raises as :meth:`entry`.
        """
        for parameter, value in (("problem", problem), ("solver", name)):
            if not isinstance(value, str):
                raise ParameterTypeError(parameter, "a string", repr(value))
        known = self._discover()
        table = known.solver_table(problem)
        # "a:b" is first of all the solver b of the distribution a: qualified names always work.
        entry = table.find(name)
        if entry is not None:
            return entry, None
        # From the right, since a distribution may come first: "distribution:name:variant".
        base, _, variant = name.rpartition(":")
        entry = table.find(base)
        if entry is None or not entry.spec.variants or not variant:
            _raise_unknown(name, table, known)
        return entry, variant

    def rules(self) -> list[Entry]:
        """All rules, by name; also those that disable each other."""
        # Those of one operation stand side by side with their owners, for a choice among them.
        entries: list[Entry] = list(self._discover().rules)
        return sorted(entries, key=lambda entry: (entry.spec.name, entry.distribution))

    def gramian_rules(self, name: str, function: type | None) -> list[Entry]:
        """The rules for an operation, as :meth:`OperationTable.find`."""
        return self._discover().rules.find(name, function)

    def gramian_rule(self, name: str) -> Entry:
        """
        The entry of a rule, by its plain or its qualified name.

        :raises UnknownNameError: If there is no such rule, or if several have the plain name.
        """
        entries = self.rules()
        found = [e for e in entries if name in (e.spec.name, e.qualified_name)]
        if len(found) != 1:
            known = [e.qualified_name for e in entries]
            close = [e.qualified_name for e in found] or difflib.get_close_matches(name, known)
            raise UnknownNameError(name, "Gramian rule", close, known)
        [entry] = found
        return entry

    @staticmethod
    def solver_class(entry: Entry) -> Any:
        """What makes the solver of an entry."""
        return load_factory(entry, entry.spec.factory)


def _name_table(
    kind: Kind, methods: Iterable[tuple[str, AggregatorSpec | ScalarizerSpec]]
) -> NameTable:
    table = NameTable(kind.word)
    for distribution, spec in methods:
        table.add(Entry(distribution, spec), names_of(spec))
    return table


def _solver_tables(solvers: Iterable[tuple[str, SolverSpec]]) -> dict[str, NameTable]:
    tables: dict[str, NameTable] = {}
    for distribution, spec in solvers:
        table = tables.setdefault(spec.problem, NameTable(f"{spec.problem} solver", spec.problem))
        table.add(Entry(distribution, spec), (spec.name,))
    return tables


def _demand_if_strict(known: _Known) -> None:
    if not switched_on("JDCORE_STRICT_PLUGINS"):
        return
    for record in known.failed():
        raise PluginError(record.label, record.reason) from record.error
    for claims, reason in known.clashes():
        raise PluginError(claims, reason)


def _raise_unknown(name: str, table: NameTable, known: _Known) -> NoReturn:
    distribution, _, plain = name.rpartition(":")
    known_provider = distribution_of(name, table.problem, table.kind)
    providers = [normalize_distribution(distribution) or known_provider]
    if table.problem is not None:  # what precedes the colon may be the solver of a variant
        providers.append(known_provider)
    records = known.records
    for record in records:
        if record.reason and record.distribution in providers:
            raise PluginError(record.label, record.reason) from record.error
    failed = known.failed()
    hint = None
    if known_provider is not None and all(r.distribution != known_provider for r in records):
        hint = f"It is provided by {known_provider}: pip install {known_provider}."
    elif found := _elsewhere(plain, table, known):
        hint = found
    elif failed:
        hint = f"Plugins that failed: {'; '.join(f'{r.label}: {r.reason}' for r in failed)}"
    elif table.problem is not None:
        hint = _installable(table.problem, {r.distribution for r in records})
    listed = table.listed_names()
    plain_names = {normalize_name(n.rpartition(":")[2]): n for n in listed}
    # Of normalized names, so that capitals and dashes do not count as differences.
    close = difflib.get_close_matches(normalize_name(plain), plain_names, cutoff=0.6)
    # Chained to the one failure that there is: most likely that plugin has the name.
    error = UnknownNameError(name, table.kind, [plain_names[c] for c in close], listed, hint)
    raise error from (failed[0].error if len(failed) == 1 else None)


def _elsewhere(name: str, table: NameTable, known: _Known) -> str | None:
    """What else has a name, one sentence; None if nothing has."""
    wanted = normalize_name(name)
    for kind, other in known.methods.items():
        names = [n for entry in other for n in names_of(entry.spec)]
        if other is not table and wanted in map(normalize_name, names):
            return f"There is one of kind {kind.word}: jdcore.get_{kind.word} makes it."
    if any(normalize_name(entry.spec.name) == wanted for entry in known.rules):
        return (
            "There is a Gramian rule of this name: `jdcore list --rules` shows it, "
            "jdcore.testing.gramian_rule_tests tries it."
        )
    return None


def _installable(problem: str, installed: Collection[str]) -> str | None:
    """What else could solve a problem, one sentence; None if nothing could."""
    others = {d: names for d, names in solver_names(problem).items() if d not in installed}
    if not others:
        return None
    offers = [f"{', '.join(map(repr, n))} (pip install {d})" for d, n in others.items()]
    return f"Not installed: {'; '.join(offers)}."


def load_class(entry: Entry, factory: str) -> type:
    """
    Import the class of a method.

    :raises PluginError: If that fails, or it is no class: pickles, configurations, subclasses and
        what is composed of it would all fail later.
    """
    found = load_factory(entry, factory)
    if not isinstance(found, type):
        reason = f"{factory!r} is no class, but of type {type(found).__name__}"
        raise PluginError(entry.qualified_name, reason)
    return found


def load_factory(entry: Entry, factory: str) -> Any:
    module, _, attribute = factory.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
        if not callable(found):
            raise TypeError(f"neither a class nor a function, but of type {type(found).__name__}")
        return found
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # as for the plugins themselves: sys.exit(), pytest.skip(), ...
        reason = f"{factory!r} cannot be loaded: {message_of(error)}"
        if isinstance(error, ImportError) and (missing := entry.missing()):
            reason += f". Run: pip install {' '.join(missing)}"
        raise PluginError(entry.qualified_name, reason) from error


def construct(cls: type, name: str, arguments: Mapping[str, Any], *first: Any) -> Any:
    """
    Call a factory with arguments by name.

    :param name: What the user calls it, for messages.
    :param first: Arguments by position.
    :raises ParameterTypeError: If an argument is unknown or missing.
    """
    signature = signature_of(cls).parameters
    parameters = dict(list(signature.items())[len(first) :])
    # Checked here, as Python's own error would name neither the method nor its arguments.
    accepts_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for argument in arguments:
        if argument not in parameters and not accepts_any:
            expected = f"one that {name!r} takes ({', '.join(parameters)})"
            raise ParameterTypeError(argument, expected, "an unknown one")
    for argument, parameter in parameters.items():
        collects = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        optional = collects or parameter.default is not parameter.empty
        if not optional and argument not in arguments:
            raise ParameterTypeError(argument, f"given for {name!r}", "nothing")
    return cls(*first, **arguments)


def signature_of(factory: Any) -> inspect.Signature:
    """The signature of a factory; one that takes anything where it tells none, as many in C."""
    try:
        return inspect.signature(factory)
    except (TypeError, ValueError):
        return inspect.signature(lambda *args, **kwargs: None)


def get_solver(problem: str, name: str, /, **arguments: Any) -> Any:
    """
    Make a solver backend.

    :param problem: The problem, e.g. ``"dual_cone"``.
    :param name: Name of the backend, e.g. ``"native"``, or ``"name:variant"`` where the backend is
        a door to several solvers (``"qpsolvers:daqp"``). ``"distribution:name"`` and
        ``"distribution:name:variant"`` say whose; a qualified name comes before a variant.
    :param arguments: Arguments of the backend, if it takes any.
    :returns: An object that satisfies the protocol of the problem.
    :raises UnknownNameError: If there is no such backend.
    :raises PluginError: If it cannot be loaded.
    :raises ParameterError: If an argument is unknown to the backend or has an unusable value.
    """
    entry, variant = registry.solver(problem, name)
    factory = registry.solver_class(entry)
    return construct(factory, name, arguments, *(() if variant is None else (variant,)))


# Errors are not kept by `cache`: a backend that is installed after a failure is found.
@cache
def shared_solver(problem: str, name: str) -> Any:
    """:func:`get_solver`, always the same object: for solvers used by name, which keep no state."""
    return get_solver(problem, name)


def get_gramian_rule(entry: Entry) -> Any:
    """
    Load the rule of an entry of :meth:`Registry.gramian_rules`.

    :raises PluginError: If it cannot be loaded.
    """
    return load_factory(entry, entry.spec.rule)


registry = Registry()
"""The registry of this process."""

if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(before=registry.before_fork, after_in_child=registry.after_fork_in_child)
