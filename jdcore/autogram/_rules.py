from __future__ import annotations

from typing import Any

from jdcore._gramian_rules import CHOOSE
from jdcore._registry import get_gramian_rule, registry
from jdcore._tables import Entry
from jdcore.errors import PluginError, PluginWarning, warn
from jdcore.graph import RULES, Rule, Rules
from jdcore.graph._saved import function_of
from jdcore.spec import API_VERSION, GramianRuleSpec


def core_entry(operation: str) -> Entry | None:
    """
    A rule of the core, described as those of plugins are.

    :param operation: The name of a node.
    """
    rule: Any = RULES.get(operation)
    if rule is None:
        return None
    spec = GramianRuleSpec(
        name=rule.__name__,
        operation=operation,
        rule=f"{rule.__module__}:{rule.__name__}",
        summary=rule.__doc__.splitlines()[0],
        steady=Rules().steady(operation, None),
        api_version=API_VERSION,
    )
    return Entry("jdcore", spec)


class InstalledRules(Rules):
    """Those of the core, and those of plugins for the operations that the core has none for."""

    def __init__(self) -> None:
        self._warned: set[str] = set()

    def find(self, name: str, node: Any) -> Rule | None:
        # Rules of the core come first, so that no plugin can change numbers that are checked here.
        rule = super().find(name, node)
        if rule is not None:
            return rule
        entry = self._entry(name, node)
        return None if entry is None else self._loaded(entry)

    def steady(self, name: str, node: Any) -> bool:
        if super().steady(name, node):
            return True
        entry = self._entry(name, node)
        # A rule that cannot be loaded does not serve, and must not be counted on before it is
        # tried.
        return entry is not None and entry.spec.steady and self._loaded(entry) is not None

    @staticmethod
    def entries(name: str, node: Any) -> list[Entry]:
        """The rules for an operation: that of the core, or none, one, or several of plugins."""
        own = core_entry(name)
        return [own] if own is not None else registry.gramian_rules(name, function_of(node))

    def _entry(self, name: str, node: Any) -> Entry | None:
        entries = self.entries(name, node)
        if len(entries) > 1:
            names = " and ".join(entry.qualified_name for entry in entries)
            self._warn(
                f"{names} claim the same operation {name}, and none of them serves it. {CHOOSE}"
            )
            return None
        return entries[0] if entries else None

    def _loaded(self, entry: Entry) -> Rule | None:
        # A broken plugin costs speed, not the step: operations without a rule are called.
        try:
            rule: Rule = get_gramian_rule(entry)
        except PluginError as error:
            self._warn(f"The rule {entry.qualified_name} is left out: {error}")
            return None
        return rule

    def _warn(self, message: str) -> None:
        # Once for each reason, not at every step.
        if message not in self._warned:
            self._warned.add(message)
            warn(PluginWarning(message))


RULES_IN_USE = InstalledRules()
