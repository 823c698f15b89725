"""A check, and the pytest tests that are made of checks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from attrs import field, frozen

from jdcore._discovery import PluginRecord, normalize_distribution
from jdcore._registry import registry
from jdcore.errors import message_of
from jdcore.testing._case import ConformanceError, NotApplicable


@frozen
class ConformanceCheck:
    """
    One check of one method, scalarizer or rule.

    :param subject: What is checked: its name, plain or ``"distribution:name"``, and for a rule the
        call that it is tried on.
    :param check: The law that has to hold.
    :param case: What the law looks at.
    :param excuse: Why the check is known to fail; None if it has to pass.
    """

    subject: str
    check: Callable[[Any], None]
    case: Any = field(repr=False)
    excuse: str | None = None

    def __str__(self) -> str:
        return f"{self.subject}-{self.check.__name__}"

    def run(self) -> None:
        """
        Run the check.

        :raises ConformanceError: If it fails, with a cause if nobody foresaw how; or if it passes
            although the spec lists it among ``expected_failures``.
        :raises NotApplicable: If there is nothing to check, e.g. on this machine.
        """
        try:
            self._attempt()
        except ConformanceError:
            if self.excuse is None:
                raise
            return
        # An excuse that is not needed any more would hide the next fault.
        if self.excuse is not None:
            raise ConformanceError(
                f"{self} passes, although the spec expects it to fail ({self.excuse}). "
                "Remove it from expected_failures."
            )

    def _attempt(self) -> None:
        try:
            self.check(self.case)
        except (ConformanceError, NotApplicable):
            raise
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # sys.exit() of a method, too
            raise ConformanceError(f"{type(error).__name__}: {message_of(error)}") from error


def checks_by(
    laws: Iterable[Callable[[Any], None]],
    subject: str,
    case: Any,
    expected_failures: Mapping[str, str],
) -> list[ConformanceCheck]:
    """
    One check per law.

    :raises ConformanceError: If ``expected_failures`` names a law that is none of these.
    """
    excuses = dict(expected_failures)
    checks = [ConformanceCheck(subject, law, case, excuses.pop(law.__name__, None)) for law in laws]
    # Most likely a misspelt check, which would be excused without anybody noticing.
    if excuses:
        raise ConformanceError(f"expected_failures of {subject} name no check: {sorted(excuses)}")
    return checks


def parametrized_test(checks: Sequence[ConformanceCheck]) -> Any:
    """A pytest test function that runs each check."""
    import pytest  # an extra: nothing else in the kit needs it

    @pytest.mark.parametrize("check", checks, ids=str)
    def test(check: ConformanceCheck) -> None:
        try:
            check.run()
        except NotApplicable as reason:
            pytest.skip(str(reason))
        except ConformanceError as error:
            if error.__cause__ is not None:
                raise  # something unforeseen: where it happened is what helps
            pytest.fail(str(error), pytrace=False)

    return test


def distribution_test(
    distribution: str,
    kind: str,
    specs_of: Callable[[PluginRecord], Iterable[Any]],
    checks_of: Callable[[str], list[ConformanceCheck]],
) -> Any:
    """
    A pytest test function that checks all that a distribution provides of one kind.

    :param kind: What messages call the kind.
    :param specs_of: The specs of this kind among those of a plugin.
    :param checks_of: The checks that apply to a name.
    :raises ConformanceError: If it provides none.
    """
    wanted = normalize_distribution(distribution)
    plugins = [plugin for plugin in registry.records() if plugin.distribution == wanted]
    names = [f"{wanted}:{spec.name}" for plugin in plugins for spec in specs_of(plugin)]
    if not names:
        reasons = "; ".join(p.reason for p in plugins if p.reason) or "it is not installed"
        raise ConformanceError(f"{distribution} provides no {kind}: {reasons}")
    return parametrized_test([check for name in names for check in checks_of(name)])
