from __future__ import annotations

import numpy as np
import torch
from attrs import define
from numpy.typing import NDArray

from jdcore.aggregation import (
    Flattening,
    GramianAggregator,
    GramianWeighting,
    report_residual,
)
from jdcore.aggregation._observation import Observation, observing
from tests.core.methods import EqualWeighting, HalvesWeighting, Largest

MATRIX = torch.tensor([[1.0, 0.0], [1.0, -2.0]])


def test_an_observer_hears_of_weights_and_gramian() -> None:
    heard: list[Observation] = []

    with observing(heard.append):
        GramianAggregator(HalvesWeighting())(MATRIX)

    [observation] = heard
    assert observation.weights is not None
    assert observation.weights.tolist() == [0.5, 0.5]
    assert observation.source.peek().tolist() == [[1.0, 1.0], [1.0, 5.0]]
    assert observation.update is None  # its products follow from these two


def test_what_weighs_inside_of_another_is_not_heard_again() -> None:
    heard: list[Observation] = []

    with observing(heard.append):
        Flattening(HalvesWeighting())(torch.ones(1, 2, 2, 1))

    assert [type(observation.method) for observation in heard] == [Flattening]


def test_nothing_is_heard_after_the_block() -> None:
    heard: list[Observation] = []

    with observing(heard.append):
        pass
    GramianAggregator(HalvesWeighting())(MATRIX)

    assert heard == []


def test_a_mean_stays_differentiable_although_the_observer_looks_at_the_gramian() -> None:
    matrix = MATRIX.clone().requires_grad_()

    with observing(lambda observation: observation.source.peek()):
        update = GramianAggregator(EqualWeighting())(matrix)
    update.sum().backward()

    assert matrix.grad is not None
    assert matrix.grad.tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_a_method_without_weights_is_heard_with_its_products() -> None:
    heard: list[Observation] = []

    with observing(heard.append):
        assert Largest()(MATRIX).tolist() == [1.0, 0.0]

    assert heard[0].weights is None
    assert heard[0].update is not None
    products, square = heard[0].update(1.0)
    assert products.tolist() == [1.0, 1.0]
    assert square.item() == 1.0


@define(eq=False)
class Solving(GramianWeighting):
    residuals: tuple[float, ...]

    def compute(self, gramian: NDArray[np.float64]) -> NDArray[np.float64]:
        for residual in self.residuals:
            report_residual(lambda residual=residual: residual)  # type: ignore[misc]
        return np.full(len(gramian), 0.5)


def test_an_observer_hears_of_the_largest_residual_that_solvers_report() -> None:
    heard: list[Observation] = []

    with observing(heard.append):
        GramianAggregator(Solving((1e-12, 3e-11)))(MATRIX)
        Flattening(Solving((2e-13,)))(torch.ones(1, 2, 2, 1))
        GramianAggregator(HalvesWeighting())(MATRIX)

    assert [observation.residual for observation in heard] == [3e-11, 2e-13, None]


def test_no_residual_is_measured_if_nobody_listens() -> None:
    def measure() -> float:
        raise AssertionError

    report_residual(measure)
