"""Look-up of Gramian rules by the operation they are for."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

RUNTIME = "runtime"
"""Stands for the distribution in the qualified name of registered specs."""

CHOOSE = (
    "Choose one with jdcore.register(spec), or switch a distribution off with "
    "JDCORE_DISABLE_PLUGINS."
)


class OperationTable:
    """
    Rules by operation; several rules for one disable each other, unless one is registered.

    The rules of the core are not in it: they come first.
    """

    def __init__(self, entries: Iterable[Any]) -> None:
        self._entries = list(entries)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._entries)

    def claims(self, operation: str) -> list[Any]:
        """All entries for this operation, also by other paths if it was imported."""
        # Paths differ for one function, such as that of the package and that of the module.
        wanted = _identity(operation)
        return [entry for entry in self._entries if _identity(entry.spec.operation) == wanted]

    def clashes(self) -> dict[str, list[str]]:
        """Names of the rules that disable each other, by operation."""
        claims: dict[Any, list[Any]] = {}
        for entry in self._entries:
            claims.setdefault(_identity(entry.spec.operation), []).append(entry)
        clashes = {
            min(entry.spec.operation for entry in entries): names
            for operation, entries in claims.items()
            if len(names := _claimants(operation, entries)) > 1
            and all(entry.distribution != RUNTIME for entry in entries)
        }
        return dict(sorted(clashes.items()))  # the first one is what strict mode raises

    def find(self, name: str, function: type | None) -> list[Any]:
        """
        The entries for an operation: none, one, or several that clash.

        :param name: The name of the node.
        :param function: The ``torch.autograd.Function`` behind it, None for an operation of torch.
            A subclass that overrides ``backward`` is another operation.
        """
        for base in () if function is None else function.__mro__:
            entries = [e for e in self._entries if _imported(e.spec.operation) is base]
            if entries:
                same = getattr(function, "backward", None) is getattr(base, "backward", None)
                return _chosen(entries) if same else []
        return _chosen([e for e in self._entries if e.spec.operation == name])


def _chosen(entries: list[Any]) -> list[Any]:
    # What somebody registered in this process settles who serves the operation.
    return [e for e in entries if e.distribution == RUNTIME] or entries


def serves_itself(operation: str) -> bool:
    """Whether the core has a rule for an operation of torch."""
    if ":" in operation:
        return False
    from jdcore.graph import RULES  # look-ups of methods need no rules of operations

    return operation in RULES


def _imported(path: str) -> Any:
    # A node can only exist once its function was imported, so nothing is imported here.
    module, colon, attribute = path.partition(":")
    return getattr(sys.modules.get(module), attribute, None) if colon else None


def _identity(operation: str) -> Any:
    """A function if it was imported, which may go by several paths, else what it is called."""
    cls = _imported(operation)
    return operation if cls is None else id(cls)


def _claimants(operation: Any, entries: list[Any]) -> list[str]:
    names = [entry.qualified_name for entry in entries]
    # The core is one of those that claim it, since its rules cannot be replaced from outside.
    own = isinstance(operation, str) and serves_itself(operation)
    return [f"jdcore:{operation}", *names] if own else names
