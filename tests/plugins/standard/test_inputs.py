"""What a method is told beside the matrix, and what it is asked for losses of another shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from jdcore import ParameterError, ParameterTypeError, get_aggregator, get_weighting
from jdcore.aggregation import Flattening, GramianSource, as_module, taken_by, weigh

J = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]])
LOSSES = torch.tensor([0.5, 4.0])


def test_what_is_known_is_given_to_calls_that_take_it() -> None:
    class Plain(torch.nn.Module):
        def forward(self, matrix: torch.Tensor) -> torch.Tensor:
            return matrix

    def function(matrix: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
        return matrix

    known = {"losses": LOSSES, "second": None}

    assert set(taken_by(function, **known)) == {"losses"}
    assert set(taken_by(get_aggregator("mean"), **known)) == {"losses"}
    assert set(taken_by(as_module(get_aggregator("graddrop")), **known)) == {"losses"}
    assert as_module(get_aggregator("sum"))(J, losses=LOSSES).tolist() == J.sum(dim=0).tolist()
    assert as_module(get_aggregator("trimmed_mean", trim_number=0))(J, losses=LOSSES).shape == (3,)
    assert taken_by(Plain(), **known) == {}
    assert taken_by(lambda matrix: matrix, **known) == {}


def test_the_mean_is_refused_for_losses_of_two_dimensions_with_the_way_out() -> None:
    source, mean = GramianSource.of(J @ J.T, LOSSES), get_weighting("mean")

    with pytest.raises(ParameterError, match=r"losses of shape \[2, 1\].*Flattening\(weighting\)"):
        weigh(mean, source, (2, 1))
    assert weigh(Flattening(mean), source, (2, 1)).shape == (2, 1)


@pytest.mark.parametrize(
    ("method", "solver", "called"),
    [
        ("upgrad", lambda gramian: gramian, "gramian, references"),
        ("mgda", lambda gramian, references: gramian, "gramian"),
        ("nash_mtl", lambda gramian: gramian, "gramian, start, level"),
    ],
)
def test_a_solver_of_another_problem_is_refused(method: str, solver: Any, called: str) -> None:
    with pytest.raises(ParameterTypeError, match=rf"It is called as solver\({called}\)"):
        get_aggregator(method, solver=solver)
