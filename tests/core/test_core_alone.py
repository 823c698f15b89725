"""The core without any plugin: run by ``tox -e core``, skipped where a plugin is installed."""

from __future__ import annotations

import subprocess
import sys

import pytest

import jdcore


@pytest.fixture(autouse=True)
def _core_alone() -> None:
    if jdcore.list_plugins():
        pytest.skip("needs an environment with the core alone (tox -e core)")


def test_no_method_is_listed() -> None:
    # In a process of its own, where no other test has registered one.
    code = "import jdcore; print(jdcore.list_aggregators())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "()\n"


@pytest.mark.parametrize("name", ["upgrad", "UPGrad", "mean"])
def test_the_error_for_a_known_method_says_what_to_install(name: str) -> None:
    with pytest.raises(jdcore.UnknownNameError, match="pip install jdplugins-standard"):
        jdcore.get_aggregator(name)


def test_the_import_of_a_known_method_says_what_to_install() -> None:
    with pytest.raises(ImportError, match="pip install jdplugins-standard"):
        from jdcore.aggregation import UPGrad  # noqa: F401  # the import is the test
