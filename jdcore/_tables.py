"""Look-up of methods and solvers by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from attrs import frozen

from jdcore._discovery import installed_version, normalize_distribution
from jdcore.errors import AmbiguousNameError
from jdcore.spec import normalize_name


@frozen
class Entry:
    distribution: str
    spec: Any

    @property
    def qualified_name(self) -> str:
        return f"{self.distribution}:{self.spec.name}"

    def missing(self) -> list[str]:
        """The distributions that it needs and that are not installed."""
        # By their metadata, as importing all of them would take seconds.
        requires = getattr(self.spec, "requires", ())
        return [required for required in requires if installed_version(required) is None]


class NameTable:
    """Entries of one kind by normalized name; several entries under one name disable the name."""

    def __init__(self, kind: str, problem: str | None = None) -> None:
        self.kind = kind
        self.problem = problem
        self._entries: dict[str, list[Entry]] = {}

    def add(self, entry: Entry, names: tuple[str, ...]) -> None:
        for name in names:
            self._entries.setdefault(normalize_name(name), []).append(entry)

    def __iter__(self) -> Iterator[Entry]:
        # An entry stands under its name and under each of its aliases.
        unique = {id(e): e for entries in self._entries.values() for e in entries}
        return iter(sorted(unique.values(), key=lambda e: (e.spec.name, e.distribution)))

    def clashes(self) -> dict[str, list[str]]:
        return {
            name: [e.qualified_name for e in entries]
            for name, entries in sorted(self._entries.items())
            if len(entries) > 1
        }

    def find(self, name: str) -> Entry | None:
        """
        The entry under a plain or qualified name, or None.

        :raises AmbiguousNameError: If several distributions claim the plain name.
        """
        # No name of a method has a colon, so that what precedes the last one is a distribution.
        distribution, colon, plain = name.rpartition(":")
        entries = self._entries.get(normalize_name(plain), [])
        if colon:
            wanted = normalize_distribution(distribution)
            # A qualified name is unique, also where several distributions claim the plain one.
            entries = [e for e in entries if e.distribution == wanted]
        if len(entries) > 1:
            raise AmbiguousNameError(name, self.kind, [e.qualified_name for e in entries])
        return entries[0] if entries else None

    def listed_names(self) -> list[str]:
        # What is listed can be looked up: a plain name that is claimed twice cannot.
        clashes = self.clashes()
        return [
            e.qualified_name if normalize_name(e.spec.name) in clashes else e.spec.name
            for e in self
        ]
