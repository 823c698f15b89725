"""The table behind the installation hints says what the distributions provide."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import jdcore
from jdcore._catalogue import METHODS, SCALARIZERS, SOLVERS, distribution_of, solver_names

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("distribution", sorted({*METHODS, *SOLVERS}))
def test_the_catalogue_holds_what_a_distribution_provides(distribution: str) -> None:
    try:
        version(distribution)
    except PackageNotFoundError:
        pytest.skip(f"{distribution} is not installed")
    [record] = [r for r in jdcore.list_plugins() if r.distribution == distribution]
    solvers: dict[str, list[str]] = {}
    for spec in record.solvers:
        solvers.setdefault(spec.problem, []).append(spec.name)

    assert METHODS.get(distribution, ()) == tuple(sorted(s.name for s in record.aggregators))
    assert SCALARIZERS.get(distribution, ()) == tuple(sorted(s.name for s in record.scalarizers))
    assert SOLVERS.get(distribution, {}) == {p: tuple(sorted(n)) for p, n in solvers.items()}


@pytest.mark.parametrize(
    ("name", "problem", "distribution"),
    [
        ("UPGrad", None, "jdplugins-standard"),
        ("quadprog", None, None),
        ("native", "dual_cone", "jdplugins-standard"),
        ("Quad-Prog", "dual_cone", "jdplugins-quadprog"),
        ("qpsolvers:daqp", "dual_cone", "jdplugins-quadprog"),
        ("jdplugins-quadprog:qpsolvers:daqp", "dual_cone", "jdplugins-quadprog"),
        ("cvxpy:SCS", "conflict_averse", "jdplugins-cvxpy"),
        ("cvxpy:SCS", "dual_cone", None),
        ("native", "no_such_problem", None),
    ],
)
def test_a_name_is_found_in_any_form(
    name: str, problem: str | None, distribution: str | None
) -> None:
    assert distribution_of(name, problem) == distribution


def test_a_problem_nobody_solves_has_no_names() -> None:
    assert solver_names("no_such_problem") == {}


def test_the_readme_names_every_scalarizer() -> None:
    text = (ROOT / "jdplugins" / "jdplugins-standard" / "README.md").read_text(encoding="utf-8")

    assert [n for n in SCALARIZERS["jdplugins-standard"] if f"`{n}`" not in text] == []


def test_scalarizers_are_found_apart_from_aggregators() -> None:
    assert distribution_of("FAMO", kind="scalarizer") == "jdplugins-standard"
    assert distribution_of("famo") is None
    assert distribution_of("upgrad", kind="scalarizer") is None
