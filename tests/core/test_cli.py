from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from jdcore import list_plugins
from jdcore.cli import main


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; from jdcore.cli import main; main(['--help']); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )

    assert done.stdout.startswith("usage: jdcore")
    assert done.stdout.endswith("False\n")


def test_the_installed_command_prints_its_version() -> None:
    command = Path(sys.executable).with_name("jdcore")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)

    assert done.stdout == f"jdcore {version('jdcore')}\n"


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        ([], "jdcore: the following arguments are required: COMMAND"),
        (["train"], "invalid choice: 'train'"),
        (["demo", "--depth", "3"], "unrecognized arguments: --depth 3"),
        (["demo", "--epochs"], "--epochs: expected one argument"),
        (["demo", "--epochs", "0"], "--epochs: must be a whole number >= 1, got '0'"),
        (["demo", "--epochs", "-3"], "--epochs: must be a whole number >= 1, got '-3'"),
        (["demo", "--epochs", "1.5"], "--epochs: must be a whole number >= 1, got '1.5'"),
        (["demo", "--seed", "-1"], "--seed: must be a whole number in [0, 4294967295], got '-1'"),
        (["demo", "--seed", "4294967296"], "in [0, 4294967295], got '4294967296'"),
        (
            ["demo", "--aggregator", "no-such"],
            "No aggregator is registered under the name 'no-such'",
        ),
        (["demo", "--aggregator", ""], "No aggregator is registered under the name ''"),
    ],
)
def test_bad_input_gives_one_line_and_exit_code_2(
    argv: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(argv)
    printed = capsys.readouterr()

    assert code == 2
    assert printed.out == ""
    assert printed.err.startswith("jdcore")
    assert printed.err.count("\n") == 1
    assert problem in printed.err


def test_without_plugins_the_demo_names_the_distribution_to_install(
    capsys: pytest.CaptureFixture[str],
) -> None:
    if list_plugins():
        pytest.skip("needs an environment with the core alone (tox -e core)")

    assert main(["demo"]) == 2
    assert "pip install jdplugins-standard" in capsys.readouterr().err
