"""What the conformance kit finds in installed distributions only."""

from __future__ import annotations

import pytest

from tests.core.registry.conftest import Run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.artefacts,
    pytest.mark.xdist_group("installed plugins"),
]

FAILURES = """
from jdcore.testing import ConformanceError, NotApplicable, checks_of
result = {{}}
for check in checks_of({method!r}):
    try:
        check.run()
    except ConformanceError as error:
        result[check.check.__name__] = str(error)
    except NotApplicable:
        pass
"""


@pytest.mark.parametrize(
    ("plugin", "method", "found"),
    [
        (
            "heavy-plugin",
            "last_row",
            {"is_listed_without_being_imported": "listing the plugin imports torch"},
        ),
        ("healthy-plugin", "first_row", {}),
    ],
)
def test_a_plugin_that_imports_torch_when_listed_is_caught(
    run: Run, plugin: str, method: str, found: dict[str, str]
) -> None:
    failures = run(FAILURES.format(method=f"{plugin}:{method}"), plugins=plugin)
    documentation = failures.pop("describes_itself")  # neither has an example

    assert documentation == "the docstring has no runnable example"
    assert failures == found
