"""What the registry knows, as plain data: the JSON of the commands, and what their tables show."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from typing import Any

from attrs import asdict

from jdcore._catalogue import METHODS, SCALARIZERS
from jdcore._discovery import AGGREGATOR, Kind, PluginRecord, installed_version
from jdcore._registry import registry
from jdcore._tables import Entry
from jdcore.errors import PluginWarning
from jdcore.spec import AggregatorSpec, GramianRuleSpec, ScalarizerSpec, SolverSpec, normalize_name


def discover() -> tuple[PluginRecord, ...]:
    """The plugins; instead of a warning from within the library, one line on standard error."""
    with warnings.catch_warnings(record=True) as caught:
        # A filter of the environment may hide or raise it.
        warnings.simplefilter("always", PluginWarning)
        records = registry.records()
    if caught:
        print("Some plugins are left out, see: jdcore plugins", file=sys.stderr)
    return records


def records_of(kind: Kind) -> list[dict[str, Any]]:
    """All of a kind that are registered, then those that known distributions would add."""
    plugins = discover()
    registered = [record_of(kind, name) for name in registry.names(kind)]
    catalogue = METHODS if kind is AGGREGATOR else SCALARIZERS
    return registered + list(_absent(registered, plugins, catalogue))


def _absent(
    registered: list[dict[str, Any]],
    plugins: tuple[PluginRecord, ...],
    catalogue: dict[str, tuple[str, ...]],
) -> Iterator[dict[str, Any]]:
    present = {plugin.distribution for plugin in plugins}
    # Another distribution may provide a method of this name.
    taken = {normalize_name(record["name"]) for record in registered}
    for distribution, names in catalogue.items():
        for name in names:
            if distribution not in present and normalize_name(name) not in taken:
                yield {
                    "name": name,
                    "installed": False,
                    "distribution": distribution,
                    "install": _pip(distribution),
                }


def record_of(kind: Kind, name: str) -> dict[str, Any]:
    """One that is registered. Errors as :func:`jdcore.describe`."""
    entry = registry.entry(kind, name)
    facts = _of_aggregator if kind is AGGREGATOR else _of_scalarizer
    return {**_description(name, entry.spec), **facts(entry.spec), **_installation(entry)}


def _of_aggregator(spec: AggregatorSpec) -> dict[str, Any]:
    return {
        "input": spec.input,
        "losses": spec.losses,
        "wrapper": spec.wrapper,
        "properties": sorted(prop.value for prop in spec.properties),
        "min_rows": spec.min_rows,
    }


def _of_scalarizer(spec: ScalarizerSpec) -> dict[str, Any]:
    return {
        "positive": spec.positive,
        "trainable": spec.trainable,
        "advanced_by": spec.advanced_by,
    }


def solver_record(entry: Entry) -> dict[str, Any]:
    """One solver backend."""
    spec: SolverSpec = entry.spec
    return {
        "name": spec.name,
        "problem": spec.problem,
        "summary": spec.summary,
        "variants": spec.variants,
        **_installation(entry),
    }


def solver_records(problem: str) -> list[dict[str, Any]]:
    """The backends for one problem."""
    return [solver_record(registry.solver(problem, name)[0]) for name in registry.solvers(problem)]


def rule_record(entry: Entry) -> dict[str, Any]:
    """One Gramian rule."""
    spec: GramianRuleSpec = entry.spec
    return {
        "name": spec.name,
        "operation": spec.operation,
        "rule": spec.rule,
        "summary": spec.summary,
        "steady": spec.steady,
        "distribution": entry.distribution,
        "version": installed_version(entry.distribution),
    }


def rule_records() -> list[dict[str, Any]]:
    """All Gramian rules that are registered."""
    discover()
    return [rule_record(entry) for entry in registry.rules()]


def plugin_records() -> Iterator[dict[str, Any]]:
    """What became of every installed plugin."""
    for record in discover():
        yield {
            "distribution": record.distribution,
            "version": record.version,
            "entry_point": record.entry_point,
            "status": _status(record),
            "reason": record.reason or None,
            "aggregators": [spec.name for spec in record.aggregators],
            "scalarizers": [spec.name for spec in record.scalarizers],
            "solvers": [f"{spec.problem}/{spec.name}" for spec in record.solvers],
            "gramian_rules": [spec.name for spec in record.gramian_rules],
            "traceback": record.traceback,
        }


def _status(record: PluginRecord) -> str:
    if record.disabled is not None:
        return "off"
    return "ok" if record.error is None else "failed"


def _description(name: str, spec: AggregatorSpec | ScalarizerSpec) -> dict[str, Any]:
    reference = spec.reference
    return {
        "name": name,
        "class_name": spec.class_name,
        "summary": spec.summary,
        "stateful": spec.stateful,
        "stochastic": spec.stochastic,
        "aliases": list(spec.aliases),
        "reference": None if reference is None else asdict(reference),
    }


def _installation(entry: Entry) -> dict[str, Any]:
    missing = entry.missing()
    return {
        "requires": list(entry.spec.requires),
        "distribution": entry.distribution,
        "version": installed_version(entry.distribution),
        "installed": not missing,
        "install": _pip(*missing) if missing else None,
    }


def _pip(*distributions: str) -> str:
    return f"pip install {' '.join(distributions)}"
