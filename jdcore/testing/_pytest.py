from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from jdcore.testing._case import ConformanceError, NotApplicable


class RunnableCheck(Protocol):
    """A check that is one test; its string is the name of the test."""

    def run(self) -> None:
        """
        Run it.

        :raises ConformanceError: If what is checked fails; with a cause, if nobody foresaw how.
        :raises NotApplicable: If there is nothing to check.
        """


def parametrized_test(checks: Sequence[RunnableCheck]) -> Any:
    """A pytest test function that runs each check."""
    import pytest  # an extra: nothing else in the kit needs it

    @pytest.mark.parametrize("check", checks, ids=str)
    def test(check: RunnableCheck) -> None:
        try:
            check.run()
        except NotApplicable as reason:
            pytest.skip(str(reason))
        except ConformanceError as error:
            if error.__cause__ is not None:
                raise  # something unforeseen: where it happened is what helps
            pytest.fail(str(error), pytrace=False)

    return test
