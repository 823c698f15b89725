"""
A subset of QM9: many properties of small molecules, one loss each, by a perceptron.

The molecules come from the distribution ``qm9pack`` (its tables alone are read). Inputs are the
numbers of atoms of each element and the eigenvalues of the Coulomb matrix; targets are eleven
properties, standardised. Published figures (`Nash-MTL <https://arxiv.org/pdf/2202.01017>`_) are for
graph networks on all molecules and are not comparable; what is compared is a method with the mean.
"""

from __future__ import annotations

import csv
from ast import literal_eval
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import numpy as np
import torch
from attrs import frozen
from numpy.typing import NDArray
from torch import Tensor, nn

from jdcore.autojac import jac_to_grad, mtl_backward
from jdcore.bench.outcome import Experiment, Outcome, Settings, Table, paired, spread
from jdcore.demo.command import make_aggregator
from jdcore.registry import describe

TARGETS = (
    "Dipole_debye",
    "Polarizability_bohr3",
    "HOMO_au",
    "LUMO_au",
    "R2_bohr2",
    "ZPVE_au",
    "InternalEnergy_0K_au",
    "InternalEnergy_298K_au",
    "Enthalphy_298K_au",
    "GibbsFreeEnergy_298K_au",
    "Heatcapacity_Cv_cal_mol_K",
)

_CHARGES = {"H": 1, "C": 6, "N": 7, "O": 8, "F": 9}
_ATOMS = 29  # of the largest molecule
_MOLECULES, _TESTS = 4000, 1000
_EPOCHS, _BATCH, _RATE = 30, 64, 1e-3
_make = partial(make_aggregator, tasks=len(TARGETS))
_DEFAULT = ("mean", "upgrad", "nash_mtl")


def installed() -> bool:
    """Whether the molecules are there."""
    return _table_path() is not None


def _table_path() -> Path | None:
    try:
        found = files("qm9pack") or ()
    except PackageNotFoundError:
        return None
    return next((Path(str(f.locate())) for f in found if f.name == "qm9_part1.csv"), None)


@cache
def molecules(count: int) -> tuple[Tensor, Tensor]:
    """Inputs [count, 34] and targets [count, 11], standardised, of every tenth molecule."""
    path = _table_path()
    assert path is not None
    # Fields may be longer than the 128 KiB that the module allows.
    csv.field_size_limit(1 << 24)
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for i, row in enumerate(csv.DictReader(file)) if i % 10 == 0][:count]
    inputs = np.array([_features(row) for row in rows])
    targets = np.array([[float(row[name]) for name in TARGETS] for row in rows])
    return _standardised(inputs), _standardised(targets)


def _features(row: dict[str, str]) -> NDArray[np.float64]:
    elements = literal_eval(row["Elements"])
    places = np.array(literal_eval(row["XYZ_Ang"]), dtype=np.float64).reshape(-1, 3)
    counts = [elements.count(element) for element in _CHARGES]
    spectrum = np.zeros(_ATOMS)
    values = np.linalg.eigvalsh(coulomb_matrix([_CHARGES[e] for e in elements], places))
    # By magnitude, as in the paper: the order must not depend on that of the atoms.
    spectrum[: len(values)] = values[np.argsort(-np.abs(values))]
    return np.concatenate([counts, spectrum])


def coulomb_matrix(charges: list[int], places: NDArray[np.float64]) -> NDArray[np.float64]:
    """``Zᵢ Zⱼ / |rᵢ - rⱼ|`` off the diagonal, ``0.5 Zᵢ^2.4`` on it (arXiv 1109.2618)."""
    z = np.array(charges, dtype=np.float64)
    distances = np.linalg.norm(places[:, None] - places, axis=-1)
    # Not zero, which would divide; the diagonal is replaced below.
    np.fill_diagonal(distances, 1.0)
    matrix: NDArray[np.float64] = np.outer(z, z) / distances
    np.fill_diagonal(matrix, 0.5 * z**2.4)
    return matrix


def _standardised(values: NDArray[np.float64]) -> Tensor:
    deviation = values.std(0)
    # Of elements that no molecule of a small choice has, the deviation is zero.
    scaled = (values - values.mean(0)) / np.where(deviation == 0.0, 1.0, deviation)
    return torch.tensor(scaled, dtype=torch.float32)


@frozen(eq=False)
class Result:
    """Mean absolute errors [11] on the test molecules, in standard deviations."""

    errors: Tensor


def train(name: str, seed: int, epochs: int, count: int) -> Result:
    """Train a trunk with one head per property."""
    inputs, targets = molecules(count)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(inputs), generator=generator)
    tests = count * _TESTS // _MOLECULES
    train_set, test_set = order[tests:], order[:tests]
    torch.manual_seed(seed)
    trunk = nn.Sequential(nn.Linear(inputs.shape[1], 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
    heads = nn.ModuleList(nn.Linear(64, 1) for _ in TARGETS)
    optimizer = torch.optim.Adam([*trunk.parameters(), *heads.parameters()], lr=_RATE)
    aggregator = _make(name)
    for batch in _batches(train_set, epochs, generator):
        optimizer.zero_grad()
        features = trunk(inputs[batch])
        errors = torch.cat([head(features) for head in heads], 1) - targets[batch]
        losses = list(errors.square().mean(0))
        mtl_backward(losses, features)
        jac_to_grad(trunk.parameters(), aggregator, losses=losses)
        optimizer.step()
    with torch.no_grad():
        features = trunk(inputs[test_set])
        errors = torch.cat([head(features) for head in heads], 1) - targets[test_set]
    return Result(errors.abs().mean(0))


def _batches(indices: Tensor, epochs: int, generator: torch.Generator) -> Iterator[Tensor]:
    for _ in range(epochs):
        order = indices[torch.randperm(len(indices), generator=generator)]
        yield from order[: len(order) - len(order) % _BATCH].view(-1, _BATCH)


def _work(settings: Settings) -> int:
    return len(settings.runs(_make, _DEFAULT))


def _run(settings: Settings, advance: Callable[[], None]) -> Outcome:
    epochs, count = (1, 400) if settings.quick else (_EPOCHS, _MOLECULES)
    found: dict[str, list[Result]] = {}
    for name, seed in settings.runs(_make, _DEFAULT):
        found.setdefault(name, []).append(train(name, seed, epochs, count))
        advance()
    baseline = found.get("mean") or next(iter(found.values()))
    rows = [
        (
            describe(name).class_name,
            spread([float(r.errors.mean()) for r in results]),
            paired([_delta(a, b) for a, b in zip(results, baseline, strict=True)], 1),
        )
        for name, results in found.items()
    ]
    table = Table(
        title=f"QM9, {count} molecules, 11 properties: mean absolute error on others",
        columns=("method", "error, standard deviations", "relative to the mean, %"),
        rows=tuple(rows),
        note="± is the standard deviation over the seeds. Relative: average over the properties, "
        "paired by seed, with the standard error of the mean; negative is better.",
    )
    data = {name: [r.errors.tolist() for r in results] for name, results in found.items()}
    return Outcome(tables=(table,), data=data)


def _delta(result: Result, baseline: Result) -> float:
    return 100.0 * float((result.errors / baseline.errors - 1.0).mean())


QM9 = Experiment(
    name="qm9",
    summary="eleven properties of molecules, a loss each (needs the distribution qm9pack)",
    make=_make,
    work=_work,
    run=_run,
)
