"""What is in the wheels and source distributions, and what is not."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STANDARD = ROOT / "jdplugins" / "jdplugins-standard"

pytestmark = [pytest.mark.slow, pytest.mark.artefacts]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with sdist and wheel of both distributions, each wheel made from its sdist."""
    folder = tmp_path_factory.mktemp("dist")
    for source in (ROOT, STANDARD):
        build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source]
        subprocess.run(build, check=True, capture_output=True, cwd=folder)
    return folder


def sources(folder: Path, package: str) -> set[str]:
    """Every file of a package but what tools leave behind."""
    files = {p.relative_to(folder) for p in (folder / package).rglob("*") if p.is_file()}
    return {
        file.as_posix()
        for file in files
        if not any(part == "__pycache__" or part.startswith(".") for part in file.parts)
    }


def wheel_names(folder: Path, wheel: str) -> set[str]:
    with zipfile.ZipFile(folder / wheel) as archive:
        return set(archive.namelist())


def read_from_wheel(folder: Path, wheel: str, name: str) -> str:
    with zipfile.ZipFile(folder / wheel) as archive:
        return archive.read(name).decode()


def sdist_names(folder: Path, stem: str) -> set[str]:
    with tarfile.open(folder / f"{stem}.tar.gz") as archive:
        return {m.name.removeprefix(f"{stem}/") for m in archive.getmembers() if m.isfile()}


def metadata(folder: Path, stem: str) -> Message:
    wheel = f"{stem}-py3-none-any.whl"
    return message_from_string(read_from_wheel(folder, wheel, f"{stem}.dist-info/METADATA"))


def run_time_requirements(folder: Path, stem: str) -> set[str]:
    requirements = metadata(folder, stem).get_all("Requires-Dist", [])
    return {r.partition(">")[0].partition("<")[0] for r in requirements if "extra ==" not in r}


def test_four_files_are_built(built: Path) -> None:
    assert {path.name for path in built.iterdir()} == {
        "jdcore-0.1.0-py3-none-any.whl",
        "jdcore-0.1.0.tar.gz",
        "jdplugins_standard-0.1.0-py3-none-any.whl",
        "jdplugins_standard-0.1.0.tar.gz",
    }


def test_the_core_wheel_holds_the_package_and_its_metadata_and_nothing_else(built: Path) -> None:
    names = wheel_names(built, "jdcore-0.1.0-py3-none-any.whl")
    files = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}

    assert names == sources(ROOT, "jdcore") | {f"jdcore-0.1.0.dist-info/{f}" for f in files}
    assert "jdcore/py.typed" in names


def test_the_plugin_wheel_holds_the_package_and_its_metadata_and_nothing_else(built: Path) -> None:
    names = wheel_names(built, "jdplugins_standard-0.1.0-py3-none-any.whl")
    files = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}
    expected = sources(STANDARD / "src", "jdplugins")

    assert names == expected | {f"jdplugins_standard-0.1.0.dist-info/{f}" for f in files}
    assert "jdplugins/standard/py.typed" in names


def test_the_namespace_of_the_plugins_belongs_to_no_distribution(built: Path) -> None:
    # A stray jdplugins/__init__.py would hide the plugins of all other distributions.
    for wheel in built.glob("*.whl"):
        assert "jdplugins/__init__.py" not in wheel_names(built, wheel.name)


def test_the_core_sdist_holds_sources_and_texts_and_nothing_else(built: Path) -> None:
    texts = {"PKG-INFO", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", ".gitignore"}

    assert sdist_names(built, "jdcore-0.1.0") == sources(ROOT, "jdcore") | texts


def test_the_plugin_sdist_holds_sources_and_texts_and_nothing_else(built: Path) -> None:
    texts = {"PKG-INFO", "pyproject.toml", "README.md", "LICENSE", ".gitignore"}

    assert sdist_names(built, "jdplugins_standard-0.1.0") == sources(STANDARD, "src") | texts


def test_the_requirements_are_few(built: Path) -> None:
    assert run_time_requirements(built, "jdcore-0.1.0") == {"torch", "numpy", "attrs", "pluggy"}
    assert run_time_requirements(built, "jdplugins_standard-0.1.0") == {"jdcore"}


@pytest.mark.parametrize("stem", ["jdcore-0.1.0", "jdplugins_standard-0.1.0"])
def test_the_metadata_tells_python_licence_and_description(built: Path, stem: str) -> None:
    fields = metadata(built, stem)

    assert fields["Requires-Python"] == ">=3.10"
    assert fields["License-Expression"] == "MIT"
    assert "```python" in str(fields.get_payload())


def test_the_entry_points_are_the_command_and_the_plugin(built: Path) -> None:
    core = read_from_wheel(
        built, "jdcore-0.1.0-py3-none-any.whl", "jdcore-0.1.0.dist-info/entry_points.txt"
    )
    plugin = read_from_wheel(
        built,
        "jdplugins_standard-0.1.0-py3-none-any.whl",
        "jdplugins_standard-0.1.0.dist-info/entry_points.txt",
    )

    assert core.split("\n") == ["[console_scripts]", "jdcore = jdcore.cli:main", ""]
    assert plugin.split("\n") == ["[jdcore.plugins]", "standard = jdplugins.standard.plugin", ""]


def test_importing_and_listing_need_no_torch() -> None:
    code = "import sys, jdcore; jdcore.list_aggregators(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "False\n"
