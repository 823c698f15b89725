"""What the commands say of real distributions, healthy and broken."""

from __future__ import annotations

import pytest

from tests.core.registry.conftest import Run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.artefacts,
    pytest.mark.xdist_group("installed plugins"),
]

COMMAND = """
import contextlib, io
from jdcore.cli import main
out, err = io.StringIO(), io.StringIO()
with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    code = main({argv})
result = code, out.getvalue(), err.getvalue()
"""


def command(run: Run, *argv: str, plugins: str) -> tuple[int, str, str]:
    code, out, err = run(COMMAND.format(argv=list(argv)), plugins=plugins)
    return code, out, err


def test_plugins_shows_versions_contents_and_reasons(run: Run) -> None:
    code, out, err = command(run, "plugins", plugins="healthy-plugin,broken-import")
    rows = {line.split()[0]: line for line in out.splitlines()}

    assert code == 0
    assert rows["healthy-plugin"].split()[1:] == ["1.0", "healthy-plugin", "ok", "1", "aggregator"]
    assert "failed  ModuleNotFoundError: No module named" in rows["broken-import"]
    assert "off     it is switched off by JDCORE_PLUGINS." in rows["broken-exit"]
    assert err == "Some plugins are left out, see: jdcore plugins\n"


def test_the_doctor_reports_plugins_and_methods_that_are_broken(run: Run) -> None:
    plugins = "healthy-plugin,broken-import,broken-factory,broken-constructor"
    code, out, _ = command(run, "doctor", plugins=plugins)

    assert code == 1
    assert "Broken: broken-import: ModuleNotFoundError: " in out
    assert "Broken: pointing_nowhere: PluginError: Plugin broken-factory:pointing_nowhere" in out
    assert "Broken: never_ready: RuntimeError: the licence server does not answer" in out
    assert "Broken: first_row" not in out


def test_names_that_clash_are_listed_with_their_distribution(run: Run) -> None:
    _, out, _ = command(run, "list", plugins="healthy-plugin,clashing-plugin")
    names = [line.split()[0] for line in out.splitlines()]

    assert "clashing-plugin:first_row" in names
    assert "healthy-plugin:first_row" in names


def test_a_method_whose_constructor_raises_is_listed_and_raises_only_when_asked_for(
    run: Run,
) -> None:
    names, error, other = run(
        """
names = jdcore.list_aggregators()
try:
    jdcore.get_aggregator("never_ready")
except RuntimeError as caught:
    result = names, str(caught), repr(jdcore.get_aggregator("first_row"))
""",
        plugins="healthy-plugin,broken-constructor",
    )

    assert names == ["first_row", "never_ready"]
    assert error == "the licence server does not answer"
    assert other == "FirstRow()"
