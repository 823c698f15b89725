"""What the functions of :mod:`jdcore.registry` are about: one registry per process."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import threading
import warnings
from collections.abc import Collection, Mapping
from functools import cache
from typing import Any, NoReturn

from jdcore._catalogue import distribution_of, solver_names
from jdcore._discovery import (
    PluginRecord,
    discover,
    names_of,
    normalize_distribution,
    switched_without_effect,
)
from jdcore._layers import CHOOSE, CORE_RULES, RUNTIME, LayerTable
from jdcore._tables import Entry, NameTable
from jdcore.errors import (
    ParameterError,
    ParameterTypeError,
    PluginError,
    PluginWarning,
    UnknownNameError,
)
from jdcore.spec import AggregatorSpec, GramianRuleSpec, normalize_name

_CORE = "jdcore"


class Registry:
    """All that is known of the installed plugins. Thread-safe; one per process is enough."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._runtime: dict[str, AggregatorSpec] = {}
        self._runtime_rules: dict[str, GramianRuleSpec] = {}
        self._forget()

    def _forget(self) -> None:
        self._records: list[PluginRecord] | None = None
        self._aggregators = NameTable("aggregator")
        self._solvers: dict[str, NameTable] = {}
        self._rules = LayerTable()
        shared_solver.cache_clear()

    # -- discovery ---------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Forget what was discovered; the next look-up discovers again. Registered specs stay."""
        with self._lock:
            importlib.invalidate_caches()
            self._forget()

    def register(self, spec: AggregatorSpec | GramianRuleSpec) -> None:
        if isinstance(spec, GramianRuleSpec):
            self._register_rule(spec)
            return
        if not isinstance(spec, AggregatorSpec):
            raise ParameterTypeError("spec", "an AggregatorSpec or a GramianRuleSpec", repr(spec))
        with self._lock:
            self._discover()
            for name in names_of(spec):
                entry = self._aggregators.find(name)
                if entry is not None and entry.qualified_name != f"{RUNTIME}:{spec.name}":
                    raise ParameterError(
                        "name", "free", f"{name!r}, taken by {entry.qualified_name}"
                    )
            self._runtime[spec.name] = spec
            self._fill(self._records or [])

    def _register_rule(self, spec: GramianRuleSpec) -> None:
        with self._lock:
            self._discover()
            claims = [e for e in self._rules.claims(spec.layer) if e.distribution != RUNTIME]
            # Several installed ones have disabled each other: then this is the choice.
            if len(claims) == 1:
                taken = f"{spec.layer!r}, taken by {claims[0].qualified_name}"
                raise ParameterError("layer", "free", taken)
            self._runtime_rules[spec.layer] = spec
            self._fill(self._records or [])

    def _discover(self) -> None:
        with self._lock:
            if self._records is not None:
                return
            records = discover()
            strict = os.environ.get("JDCORE_STRICT_PLUGINS", "0") not in ("", "0")
            failed = [r for r in records if r.error is not None]
            if strict and failed:
                raise PluginError(failed[0].label, failed[0].reason) from failed[0].error
            self._fill(records)
            clashes = self._clashes()
            if strict and clashes:
                self._forget()
                raise PluginError(*clashes[0])
            self._records = records
        troubles = [f"{r.label} failed: {r.reason}" for r in failed]
        troubles += [f"{claims}: {reason}" for claims, reason in clashes]
        troubles += [
            f"{n!r} is switched on or off, but not installed"
            for n in switched_without_effect(records)
        ]
        if troubles:
            lines = "".join(f"\n- {trouble}" for trouble in troubles)
            warnings.warn(
                f"Some jdcore plugins are left out (see jdcore.list_plugins()):{lines}",
                PluginWarning,
                stacklevel=_stacklevel_of_caller(),
            )

    def _fill(self, records: list[PluginRecord]) -> None:
        aggregators = NameTable("aggregator")
        solvers: dict[str, NameTable] = {}
        for record in records:
            for spec in record.aggregators:
                aggregators.add(Entry(record.distribution, spec), names_of(spec))
            for solver in record.solvers:
                table = solvers.setdefault(
                    solver.problem, NameTable(f"{solver.problem} solver", solver.problem)
                )
                table.add(Entry(record.distribution, solver), (solver.name,))
        for spec in self._runtime.values():
            aggregators.add(Entry(RUNTIME, spec), names_of(spec))
        self._aggregators, self._solvers = aggregators, solvers
        self._rules = self._rule_table(records)

    def _rule_table(self, records: list[PluginRecord]) -> LayerTable:
        table = LayerTable()
        for rule in CORE_RULES:
            table.add(Entry(_CORE, rule))
        for record in records:
            for rule in record.gramian_rules:
                table.add(Entry(record.distribution, rule))
        for rule in self._runtime_rules.values():
            table.add(Entry(RUNTIME, rule))
        return table

    def _clashes(self) -> list[tuple[str, str]]:
        return [
            (" and ".join(claims), f"they claim the same {table.kind} name {name!r}.")
            for table in (self._aggregators, *self._solvers.values())
            for name, claims in table.clashes().items()
        ] + [
            (" and ".join(claims), f"they claim the same layer {layer}. {CHOOSE}")
            for layer, claims in self._rules.clashes().items()
        ]

    def records(self) -> tuple[PluginRecord, ...]:
        self._discover()
        return tuple(self._records or ())

    # -- look-up -----------------------------------------------------------------------------------

    def aggregators(self) -> list[str]:
        self._discover()
        return self._aggregators.listed_names()

    def solvers(self, problem: str) -> list[str]:
        self._discover()
        return self._solvers.get(problem, NameTable(problem)).listed_names()

    def problems(self) -> list[str]:
        self._discover()
        return sorted(self._solvers)

    def aggregator(self, name: str) -> Entry:
        """
        The entry of a method.

        :raises ParameterTypeError: If the name is no string.
        :raises AmbiguousNameError: If several distributions claim the plain name.
        :raises PluginError: If the plugin that is known to provide it failed or is switched off.
        :raises UnknownNameError: If there is no such method.
        """
        if not isinstance(name, str):
            raise ParameterTypeError("name", "a string", repr(name))
        self._discover()
        entry = self._aggregators.find(name)
        if entry is None:
            self._raise_unknown(name, self._aggregators)
        return entry

    def solver(self, problem: str, name: str) -> tuple[Entry, str | None]:
        """
        The entry of a solver backend and the variant asked for, from ``"name"``, ``"name:variant"``
        or either after ``"distribution:"``. Raises as :meth:`aggregator`.
        """
        if not isinstance(name, str):
            raise ParameterTypeError("solver", "a string", repr(name))
        self._discover()
        table = self._solvers.get(problem, NameTable(f"{problem} solver", problem))
        # "a:b" is first of all the solver b of the distribution a: qualified names always work.
        entry = table.find(name)
        if entry is not None:
            return entry, None
        base, _, variant = name.rpartition(":")
        entry = table.find(base)
        if entry is None or not entry.spec.variants or not variant:
            self._raise_unknown(name, table)
        return entry, variant

    def gramian_rules(self, layer: type) -> list[Entry]:
        """The rules for a class of layers: none, one, or several that clash."""
        self._discover()
        return self._rules.find(layer)

    def gramian_rule(self, name: str) -> Entry:
        """
        The entry of a rule, by its plain or its qualified name.

        :raises UnknownNameError: If there is no such rule, or if several have the plain name.
        """
        self._discover()
        entries = list(self._rules)
        found: list[Entry] = [e for e in entries if name in (e.spec.name, e.qualified_name)]
        if len(found) != 1:
            known = [e.qualified_name for e in entries]
            close = [e.qualified_name for e in found] or difflib.get_close_matches(name, known)
            raise UnknownNameError(name, "Gramian rule", close, known)
        [entry] = found
        return entry

    def _raise_unknown(self, name: str, table: NameTable) -> NoReturn:
        distribution, _, plain = name.rpartition(":")
        known_provider = distribution_of(name, table.problem)
        providers = [normalize_distribution(distribution) or known_provider]
        if table.problem is not None:  # what precedes the colon may be the solver of a variant
            providers.append(known_provider)
        records = self._records or []
        for record in records:
            if record.reason and record.distribution in providers:
                raise PluginError(record.label, record.reason) from record.error
        failed = [r for r in records if r.error is not None]
        hint = None
        if known_provider is not None and all(r.distribution != known_provider for r in records):
            hint = f"It is provided by {known_provider}: pip install {known_provider}."
        elif failed:
            hint = f"Plugins that failed: {'; '.join(f'{r.label}: {r.reason}' for r in failed)}"
        elif table.problem is not None:
            hint = _installable(table.problem, {r.distribution for r in records})
        known = table.listed_names()
        plain_names = {normalize_name(n.rpartition(":")[2]): n for n in known}
        close = difflib.get_close_matches(normalize_name(plain), plain_names, cutoff=0.6)
        error = UnknownNameError(name, table.kind, [plain_names[c] for c in close], known, hint)
        raise error from (failed[0].error if len(failed) == 1 else None)

    # -- classes -----------------------------------------------------------------------------------

    @staticmethod
    def solver_class(entry: Entry) -> type:
        """What makes the solver of an entry."""
        return load_factory(entry.qualified_name, entry.spec.factory)


def _installable(problem: str, installed: Collection[str]) -> str | None:
    """What else could solve a problem, one sentence; None if nothing could."""
    others = {d: names for d, names in solver_names(problem).items() if d not in installed}
    if not others:
        return None
    offers = [f"{', '.join(map(repr, n))} (pip install {d})" for d, n in others.items()]
    return f"Not installed: {'; '.join(offers)}."


def load_factory(provider: str, factory: str) -> type:
    module, _, attribute = factory.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)  # type: ignore[no-any-return]
    except Exception as error:
        raise PluginError(provider, f"{factory!r} cannot be loaded: {error}") from error


def _stacklevel_of_caller() -> int:
    """Stack level of the first frame outside this package, where a warning helps the user."""
    level = 2
    frame = inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "jdcore":
        frame = frame.f_back
        level += 1
    return level - 2


def construct(cls: type, name: str, arguments: Mapping[str, Any], *first: Any) -> Any:
    signature = inspect.signature(cls)
    accepts_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    for argument in arguments:
        if argument not in signature.parameters and not accepts_any:
            known = ", ".join(signature.parameters)
            raise ParameterTypeError(
                argument, f"one that {name!r} takes ({known})", "an unknown one"
            )
    return cls(*first, **arguments)


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


@cache
def shared_solver(problem: str, name: str) -> Any:
    """:func:`get_solver`, always the same object: for solvers used by name, which keep no state."""
    return get_solver(problem, name)


def get_gramian_rule(entry: Entry) -> Any:
    """
    Make the rule of an entry of :meth:`Registry.gramian_rules`.

    :raises PluginError: If it cannot be loaded.
    """
    return load_factory(entry.qualified_name, entry.spec.rule)()


registry = Registry()
"""The registry of this process."""
