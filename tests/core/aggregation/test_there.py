"""Methods that work where the Gramian is: what decides, and what they are given."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from attrs import define
from numpy.typing import NDArray
from torch import Tensor

from jdcore.aggregation import GramianSource, GramianWeighting, _weighting
from jdcore.errors import NonFiniteError
from jdcore.linalg import proximal_level


@define(eq=False)
class Diagonal(GramianWeighting):
    """The diagonal of what it is given; times -1 on the CPU."""

    def compute(self, gramian: NDArray[np.float64]) -> NDArray[np.float64]:
        return -gramian.diagonal()

    def compute_there(self, gramian: Tensor) -> Tensor | None:
        return gramian.diagonal()


class ProximalDiagonal(Diagonal):
    proximal = True


class OnlyHere(Diagonal):
    def compute(self, gramian: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.zeros(len(gramian))


class Unable(Diagonal):
    def compute_there(self, gramian: Tensor) -> Tensor | None:
        return None


class Elsewhere(Tensor):
    """Says that it is on an accelerator."""

    is_cpu = False


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Gramian counts as one that is on an accelerator."""
    gramian_of = Diagonal.matrix_of
    monkeypatch.setattr(
        Diagonal, "matrix_of", lambda self, source: gramian_of(self, source).as_subclass(Elsewhere)
    )


@pytest.fixture
def on_an_accelerator(elsewhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """So few rows that numbers can be written down count as many, too."""
    monkeypatch.setattr(_weighting, "_THERE", 1)


def test_on_the_cpu_the_array_is_asked_for() -> None:
    assert Diagonal()(torch.eye(200)).tolist() == [-1.0] * 200


@pytest.mark.usefixtures("elsewhere")
def test_for_few_rows_the_array_is_asked_for() -> None:
    assert Diagonal()(torch.eye(127)).tolist() == [-1.0] * 127
    assert Diagonal()(torch.eye(128)).tolist() == [1.0] * 128


@pytest.mark.usefixtures("on_an_accelerator")
def test_the_gramian_is_given_where_it_is() -> None:
    assert Diagonal()(torch.diag(torch.tensor([1.0, 2.0]))).tolist() == [1.0, 2.0]


@pytest.mark.usefixtures("on_an_accelerator")
def test_it_has_the_proximal_term_of_its_precision_and_is_not_modified() -> None:
    G = torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64))
    source = GramianSource(2, torch.float32, G.device, lambda: G)

    weights = ProximalDiagonal().weigh(source)

    level = 1.0 + proximal_level(2, torch.float32)
    assert weights.tolist() == [level, 2.0 * level]
    assert G.diagonal().tolist() == [1.0, 2.0]


@pytest.mark.usefixtures("on_an_accelerator")
def test_a_subclass_that_overrides_compute_means_that_everywhere() -> None:
    assert OnlyHere()(torch.eye(2)).tolist() == [0.0, 0.0]


@pytest.mark.usefixtures("on_an_accelerator")
def test_a_method_that_cannot_is_asked_for_arrays() -> None:
    assert Unable()(torch.eye(2)).tolist() == [-1.0, -1.0]


@pytest.mark.usefixtures("on_an_accelerator")
def test_what_is_not_finite_gives_nan_or_raises_as_on_the_cpu() -> None:
    G = torch.eye(2)
    G[0, 0] = math.nan

    assert Diagonal()(G).isnan().all()
    with pytest.raises(NonFiniteError):
        Diagonal(check_finite=True)(G)
