"""An error on one process is raised on all, none writes anything, and none waits."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import jdcore
from jdcore import ParameterError, PeerError
from jdcore.aggregation import GramianAggregator
from jdcore.autojac import backward, jac_to_grad
from tests.distributed.common import (
    Tasks,
    assert_identical,
    gradients,
    losses_of,
    own_batch,
)
from tests.distributed.conftest import Run


def _with_rows(count: int = 3) -> Tasks:
    model = Tasks()
    backward(losses_of(model(own_batch())[1])[:count])
    return model


def _step(model: nn.Module, aggregator: object) -> Tensor | None:
    return jac_to_grad(model.parameters(), aggregator, group=dist.group.WORLD)


def _untouched(model: nn.Module) -> None:
    assert not gradients(model)
    assert any(hasattr(p, "jac") for p in model.parameters())


def _works_afterwards() -> None:
    model = _with_rows()
    _step(model, GramianAggregator(lambda gramian: gramian.diagonal()))
    assert_identical(gradients(model))


def _in_the_weighting() -> None:
    for culprit in range(dist.get_world_size()):

        def weighting(gramian: Tensor, culprit: int = culprit) -> Tensor:
            if dist.get_rank() == culprit:
                raise ValueError("no weights here")
            return gramian.diagonal()

        model = _with_rows()
        if dist.get_rank() == culprit:
            with pytest.raises(ValueError, match="no weights here"):
                _step(model, GramianAggregator(weighting))
        else:
            with pytest.raises(PeerError, match="ValueError: no weights here") as caught:
                _step(model, GramianAggregator(weighting))
            assert caught.value.rank == culprit
        _untouched(model)
    _works_afterwards()


def test_an_error_of_a_weighting_on_any_process(two: Run) -> None:
    two(_in_the_weighting)


def _before_anything_is_exchanged() -> None:
    model = _with_rows()
    one = dist.get_rank() == 1
    with pytest.raises(ParameterError if one else PeerError, match="aggregator"):
        _step(model, None if one else GramianAggregator(torch.diag))
    _untouched(model)
    preferences = torch.ones(2 if one else 3, dtype=torch.float64)
    with pytest.raises(ParameterError if one else PeerError, match="pref_vector"):
        _step(model, jdcore.get_aggregator("upgrad", pref_vector=preferences))
    _untouched(model)
    with pytest.raises(ParameterError if one else PeerError, match="weights"):
        _step(model, jdcore.get_aggregator("constant", weights=preferences))
    _untouched(model)
    _works_afterwards()


def test_arguments_that_are_wrong_on_one_process(two: Run) -> None:
    two(_before_anything_is_exchanged)


def _rows_differ() -> None:
    model = _with_rows(2 + dist.get_rank())
    with pytest.raises(ParameterError, match="between 2 and 3 rows"):
        _step(model, GramianAggregator(torch.diag))
    _untouched(model)
    with pytest.raises(ParameterError, match="none on any process"):
        _step(Tasks(), GramianAggregator(torch.diag))
    model = _with_rows()
    if dist.get_rank() == 1:
        parameters = list(model.parameters())[::-1]
    else:
        parameters = list(model.parameters())
    with pytest.raises(ParameterError, match="same tensors in the same order"):
        jac_to_grad(parameters, GramianAggregator(torch.diag), group=dist.group.WORLD)
    _untouched(model)
    with pytest.raises(ParameterError, match="`aggregator` must be of the same class on all"):
        _step(model, jdcore.get_aggregator("mean" if dist.get_rank() else "upgrad"))
    _untouched(model)
    with pytest.raises(ParameterError, match="`losses` must be given on all processes or on none"):
        jac_to_grad(
            model.parameters(),
            GramianAggregator(torch.diag),
            losses=torch.ones(3) if dist.get_rank() else None,
            group=dist.group.WORLD,
        )
    _untouched(model)
    # One module keeps all of them equal, also those that one process does not give.
    wrapped = nn.parallel.DistributedDataParallel(nn.Linear(5, 3).double())
    backward(wrapped(own_batch()).square().mean(0))
    parameters = list(wrapped.parameters())[: 2 - dist.get_rank()]
    with pytest.raises(ParameterError, match="same tensors in the same order"):
        jac_to_grad(parameters, GramianAggregator(torch.diag))
    _untouched(wrapped)
    _works_afterwards()


def test_processes_that_have_different_things(two: Run) -> None:
    two(_rows_differ)


def _different_ways() -> None:
    """The same kind of method that asks for the Gramian on one process only."""

    class Weighting:
        def weigh(self, source: object) -> Tensor:
            if dist.get_rank() == 0:
                return source.gramian().diagonal()  # type: ignore[attr-defined]
            return torch.ones(3, dtype=torch.float64)

        def __call__(self, gramian: Tensor) -> Tensor:
            return gramian.diagonal()

    model = _with_rows()
    with pytest.raises(PeerError, match="do not call the same functions"):
        _step(model, GramianAggregator(Weighting()))
    _untouched(model)
    _works_afterwards()


def test_processes_that_do_different_things(two: Run) -> None:
    two(_different_ways)


def _no_rows_on_one() -> None:
    """A process without any task in its batch takes part with zeros."""
    model = _with_rows() if dist.get_rank() else Tasks()
    alone = _with_rows() if dist.get_rank() else Tasks()
    _step(model, jdcore.get_aggregator("mean"))
    if dist.get_rank():
        jac_to_grad(alone.parameters(), jdcore.get_aggregator("mean"))
        for ours, own in zip(gradients(model), gradients(alone), strict=True):
            assert torch.allclose(ours, own / 2)
    assert_identical(gradients(model))


def test_a_process_without_any_row(two: Run) -> None:
    two(_no_rows_on_one)


class _Counting:
    """A weighting with a state that changes before it fails."""

    def __init__(self) -> None:
        self.reset()

    def __call__(self, gramian: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 2 and dist.get_rank() == 1:
            raise ValueError("the second time")
        return gramian.diagonal()

    def reset(self) -> None:
        self.calls = 0

    def state_dict(self) -> dict[str, int]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, int], /) -> None:
        self.calls = state["calls"]


class _CountingAggregator(GramianAggregator):
    def reset(self) -> None:
        self.weighting.reset()

    def state_dict(self) -> dict[str, int]:
        return self.weighting.state_dict()

    def load_state_dict(self, state: dict[str, int], /) -> None:
        self.weighting.load_state_dict(state)


def _state() -> None:
    aggregator = _CountingAggregator(_Counting())
    _step(_with_rows(), aggregator)
    with pytest.raises(ValueError if dist.get_rank() else PeerError, match="the second time"):
        _step(_with_rows(), aggregator)
    assert aggregator.state_dict() == {"calls": 1}


def test_a_failed_step_leaves_the_state(two: Run) -> None:
    two(_state)


def _nonfinite() -> None:
    """One process's NaN, in columns of another one, as on one process."""
    for name in ("trimmed_mean", "upgrad", "mean", "graddrop"):
        model = _with_rows()
        if dist.get_rank() == 0:
            model.heads[2].bias.jac[0] = float("nan")
        arguments = {"trim_number": 1} if name == "trimmed_mean" else {}
        _step(model, jdcore.get_aggregator(name, **arguments))
        assert all(gradient.isnan().all() for gradient in gradients(model)), name
        model = _with_rows()
        if dist.get_rank() == 0:
            model.heads[2].bias.jac[0] = float("nan")
        with pytest.raises(jdcore.NonFiniteError, match=r"\[0\]"):
            _step(model, jdcore.get_aggregator(name, check_finite=True, **arguments))
        _untouched(model)


def test_values_that_are_not_finite(two: Run) -> None:
    two(_nonfinite)
