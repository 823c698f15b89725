"""Output that goes to narrow, closed or full places, and plugins that print when imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.core.registry.unpacked import PLUGIN, unpack
from tests.environments import clean_environment

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full")


def run(
    folder: Path, *argv: str, redirect: str = "", **variables: str
) -> subprocess.CompletedProcess[bytes]:
    """Run the command in a shell, with the plugins of a folder only."""
    plugins = ",".join(path.stem for path in folder.glob("*.py"))
    code = f"import sys; from jdcore.cli import main; sys.exit(main({list(argv)}))"
    variables.setdefault("PYTHONUNBUFFERED", "")  # as users have it
    return subprocess.run(
        ["sh", "-c", f'exec "$0" -W ignore -c "$1" {redirect}', sys.executable, code],
        env=clean_environment(PYTHONPATH=str(folder), JDCORE_PLUGINS=plugins, **variables),
        cwd=folder,
        capture_output=True,
        timeout=60,
    )


@pytest.fixture
def noisy(tmp_path: Path) -> Path:
    prints = "import os\nprint('hello', flush=True)\nos.write(1, b'hello from C')\n"
    unpack(tmp_path, "noisy", {"noisy.py": prints + PLUGIN.format(method="loud")})
    return tmp_path


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    source = PLUGIN.format(method="plain").replace("For tests.", "J Jᵀ of Hervé, 𝔾.")
    unpack(tmp_path, "plain", {"plain.py": source})
    return tmp_path


@pytest.mark.parametrize("command", ["list", "plugins", "doctor"])
def test_a_plugin_that_prints_on_import_leaves_json_alone(noisy: Path, command: str) -> None:
    done = run(noisy, command, "--json")

    assert b"loud" in done.stdout
    json.loads(done.stdout)
    assert b"hello\n" in done.stderr
    assert b"hello from C" in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8", "utf-16"])
def test_every_encoding_can_show_every_text(foreign: Path, encoding: str) -> None:
    table = run(foreign, "list", PYTHONIOENCODING=encoding)
    data = run(foreign, "list", "--json", PYTHONIOENCODING=encoding)

    assert (table.returncode, table.stderr) == (0, b"")
    assert (data.returncode, data.stderr) == (0, b"")
    [record] = [r for r in json.loads(data.stdout.decode(encoding)) if r["name"] == "plain"]
    assert record["summary"] == "J Jᵀ of Hervé, 𝔾."
    shown = record["summary"].encode(encoding, errors="backslashreplace").decode(encoding)
    assert shown in table.stdout.decode(encoding)


def test_the_c_locale_can_show_every_text(foreign: Path) -> None:
    # The last one is set by tox.
    bare = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": ""}
    table, data = run(foreign, "list", **bare), run(foreign, "list", "--json", **bare)

    assert (table.returncode, table.stderr) == (0, b"")
    assert b"J J\\u1d40 of Herv\\xe9, \\U0001d53e." in table.stdout
    assert b"J J\\u1d40" in data.stdout


@needs_full
@pytest.mark.parametrize("argv", [["list"], ["list", "--json"], ["--help"], ["--version"]])
def test_a_full_output_gives_one_line_and_exit_code_2(foreign: Path, argv: list[str]) -> None:
    done = run(foreign, *argv, redirect=f"> {FULL}")

    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1
    assert done.stderr.endswith(b": No space left on device\n")


@needs_full
@pytest.mark.parametrize("redirect", [f"2> {FULL}", "2>&-", f"> {FULL} 2> {FULL}"])
def test_without_standard_error_the_exit_code_is_left(foreign: Path, redirect: str) -> None:
    assert run(foreign, "info", "nobody", redirect=redirect).returncode == 2


@pytest.mark.parametrize("redirect", [">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_error(noisy: Path, redirect: str) -> None:
    done = run(noisy, "list", "--json", redirect=redirect)

    assert (done.returncode, done.stdout) == (0, b"")
    assert b"Traceback" not in done.stderr
