"""Installing or removing one plugin changes nothing for the others."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest

from tests.environments import clean_environment, install

pytestmark = [pytest.mark.slow, pytest.mark.artefacts]

ROOT = Path(__file__).parents[2]
SOLVERS = {
    "standard": {("dual_cone", "native"), ("min_norm", "native"), ("nash_bargaining", "native")},
    "quadprog": {("dual_cone", "quadprog"), ("dual_cone", "qpsolvers")},
    "cvxpy": {("conflict_averse", "cvxpy"), ("nash_bargaining", "ecos")},
}

REPORT = """
import json, torch, jdcore
from jdcore.errors import PluginError

J = torch.randn(4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
POSED = {
    "dual_cone": ("upgrad", {}),
    "conflict_averse": ("cagrad", {"c": 0.5}),
    "nash_bargaining": ("nash_mtl", {}),
    "fair_allocation": ("fairgrad", {"alpha": 2.0}),
    "min_norm": ("mgda", {}),
}
methods = jdcore.list_aggregators()
solvers, updates = [], {}
for problem, names in jdcore.list_solvers().items():
    method, arguments = POSED[problem]
    for name in names:
        solvers.append((problem, name))
        if method not in methods:
            continue
        try:
            aggregator = jdcore.get_aggregator(method, solver=name, **arguments)
        except PluginError:  # its library is not part of the environment that runs the tests
            continue
        updates[f"{problem} {name}"] = aggregator(J).tolist()
plugins = [(p.distribution, p.reason) for p in jdcore.list_plugins()]
print(json.dumps({"plugins": plugins, "methods": methods, "solvers": solvers, "updates": updates}))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Interpreter of an environment with the core alone, and links to all it depends on."""
    folder = tmp_path_factory.mktemp("plugins") / "venv"
    venv.create(folder, symlinks=True)
    [purelib] = folder.glob("lib/python*/site-packages")
    for parent in {sysconfig.get_paths()[key] for key in ("purelib", "platlib")}:
        for entry in Path(parent).iterdir():
            ours = "jdcore" in entry.name.lower() or "jdplugins" in entry.name.lower()
            if not ours and not (purelib / entry.name).exists():
                (purelib / entry.name).symlink_to(entry)
    python = folder / "bin" / "python"
    install(python, ROOT)
    return python


def report(python: Path) -> dict[str, Any]:
    done = subprocess.run(
        [python, "-W", "error", "-c", REPORT],
        env=clean_environment(),
        cwd=python.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def add(python: Path, plugin: str) -> None:
    install(python, ROOT / "jdplugins" / f"jdplugins-{plugin}")


def remove(python: Path, plugin: str) -> None:
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    subprocess.run([*pip, "uninstall", "-q", "-y", f"jdplugins-{plugin}"], check=True)


def check(python: Path, *plugins: str) -> dict[str, Any]:
    """What is there is what these plugins provide, and no plugin is in trouble."""
    found = report(python)
    assert found["plugins"] == [[f"jdplugins-{p}", ""] for p in sorted(plugins)]
    solvers = {tuple(solver) for solver in found["solvers"]}
    for plugin, provided in SOLVERS.items():
        assert provided <= solvers if plugin in plugins else not provided & solvers
    return found


def test_plugins_come_and_go_without_a_trace(python: Path) -> None:
    assert check(python) == {"plugins": [], "methods": [], "solvers": [], "updates": {}}
    add(python, "quadprog")
    assert check(python, "quadprog")["methods"] == []
    remove(python, "quadprog")
    add(python, "standard")
    alone = check(python, "standard")
    assert set(alone["updates"]) >= {f"{problem} native" for problem, _ in SOLVERS["standard"]}

    add(python, "quadprog")
    with_quadprog = check(python, "standard", "quadprog")
    add(python, "cvxpy")
    with_both = check(python, "standard", "quadprog", "cvxpy")
    remove(python, "quadprog")
    with_cvxpy = check(python, "standard", "cvxpy")

    for found in (with_quadprog, with_both, with_cvxpy):
        assert found["methods"] == alone["methods"]
        assert alone["updates"].items() <= found["updates"].items()
    assert with_both["updates"] == with_quadprog["updates"] | with_cvxpy["updates"]
    remove(python, "cvxpy")
    assert check(python, "standard") == alone


def test_a_plugin_whose_library_is_missing_leaves_the_others_alone(
    python: Path, tmp_path: Path
) -> None:
    add(python, "standard")
    add(python, "quadprog")
    # Listed, as listing imports no solver; refused with the reason when asked for.
    code = """
import sys
sys.modules["quadprog"] = None
import torch, jdcore
assert "quadprog" in jdcore.list_solvers("dual_cone")["dual_cone"]
jdcore.get_aggregator("upgrad")(torch.eye(2))
try:
    jdcore.get_aggregator("upgrad", solver="quadprog")
except jdcore.PluginError as error:
    print(error)
"""
    done = subprocess.run(
        [python, "-W", "error", "-c", code],
        env=clean_environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Plugin jdplugins-quadprog:quadprog cannot be used")
    remove(python, "quadprog")
    remove(python, "standard")
