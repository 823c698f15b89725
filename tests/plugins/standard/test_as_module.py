from __future__ import annotations

import io

import pytest
import torch
from attrs import define
from torch import Tensor
from torch.nn import Linear, Module, Sequential

from jdcore import ParameterError, ParameterTypeError, get_aggregator, get_weighting
from jdcore.aggregation import (
    Flattening,
    GramianAggregator,
    StateFields,
    as_module,
    state_field,
)


@define(eq=False)
class Counting(StateFields):
    """A weighting that counts its calls."""

    calls: int = state_field(int)

    def __call__(self, gramian: Tensor) -> Tensor:
        self.calls += 1
        return gramian.new_full((len(gramian),), float(self.calls))


MATRIX = torch.tensor([[1.0, 2.0], [3.0, 4.0]])


def test_the_module_calls_what_it_wraps_and_gives_it_back() -> None:
    aggregator = get_aggregator("mean")
    module = as_module(aggregator)

    assert isinstance(module, Module)
    assert module.wrapped is aggregator
    assert torch.equal(module(MATRIX), aggregator(MATRIX))


def test_plain_functions_are_wrapped_too() -> None:
    assert as_module(lambda matrix: matrix[0])(MATRIX).tolist() == [1.0, 2.0]


def test_what_cannot_be_called_is_refused() -> None:
    with pytest.raises(ParameterTypeError, match="`wrapped` must be a weighting or an aggregator"):
        as_module("mean")


def test_the_repr_shows_the_wrapped_object_in_a_model() -> None:
    model = Sequential(Linear(1, 1), as_module(get_weighting("mean")))

    assert "(1): AggregationModule(MeanWeighting())" in repr(model)


def test_forward_hooks_run() -> None:
    seen: list[Tensor] = []
    module = as_module(get_aggregator("mean"))
    module.register_forward_hook(lambda *call: seen.append(call[2]))

    module(MATRIX)

    assert [vector.tolist() for vector in seen] == [[2.0, 3.0]]


def test_a_stateless_method_adds_nothing_to_a_checkpoint() -> None:
    assert as_module(get_aggregator("mean")).state_dict() == {}


@pytest.mark.parametrize("adapt", [lambda w: w, GramianAggregator, Flattening])
def test_the_state_travels_in_the_checkpoint_of_a_model_also_through_adapters(
    adapt: type,
) -> None:
    weighting, fresh = Counting(), Counting()
    model = torch.nn.ModuleDict({"layer": Linear(2, 2), "method": as_module(adapt(weighting))})
    model["method"](torch.eye(2))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = torch.nn.ModuleDict({"layer": Linear(2, 2), "method": as_module(adapt(fresh))})

    other.load_state_dict(torch.load(file, weights_only=True))

    assert fresh.calls == 1
    assert torch.equal(other["layer"].weight, model["layer"].weight)


def test_a_composed_aggregator_carries_its_state() -> None:
    one, two = (as_module(get_aggregator("gradvac")) for _ in range(2))
    one(torch.randn(3, 5))

    two.load_state_dict(one.state_dict())

    assert torch.equal(two.wrapped.weighting.phi, one.wrapped.weighting.phi)


def test_a_state_that_does_not_fit_is_refused() -> None:
    module = as_module(Counting())

    with pytest.raises(ParameterError, match="keys"):
        module.set_extra_state({"steps": 1})


def test_moving_the_module_moves_tensor_arguments_but_not_the_state() -> None:
    aggregator = get_aggregator("constant", weights=torch.ones(2))
    stateful = get_aggregator("gradvac")
    stateful(MATRIX)

    assert as_module(aggregator).to("meta").wrapped is aggregator
    as_module(stateful).to("meta")

    assert aggregator.weighting.weights.device.type == "meta"
    assert stateful.weighting.phi.device.type == "cpu"


def test_a_module_can_be_wrapped_and_keeps_its_own_parameters() -> None:
    layer = Linear(2, 1)
    module = as_module(layer)

    assert dict(module.named_parameters()).keys() == {"wrapped.weight", "wrapped.bias"}
    assert torch.equal(module(MATRIX), layer(MATRIX))
