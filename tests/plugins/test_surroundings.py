"""Methods give what they give elsewhere, whatever is the default device or transforms the code."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

import jdcore
from jdcore import AggregatorSpec, ParameterError, ScalarizerSpec
from jdcore.aggregation import stateful_part

SPECS = [spec for plugin in jdcore.list_plugins() for spec in plugin.aggregators]
# Those that are modules make their parameters on the default device, as all modules do.
SCALARIZERS = [s for p in jdcore.list_plugins() for s in p.scalarizers if not s.trainable]


TRANSFORMS: dict[str, Callable[[Callable[[torch.Tensor], torch.Tensor]], Any]] = {
    "vmap": lambda inside: torch.vmap(inside)(torch.ones(2)),
    "grad": lambda inside: torch.func.grad(inside)(torch.tensor(1.0)),
    "jacfwd": lambda inside: torch.func.jacfwd(inside)(torch.tensor(1.0)),
    "functionalize": lambda inside: torch.func.functionalize(inside)(torch.tensor(1.0)),
}


def given_to(spec: AggregatorSpec, matrix: torch.Tensor) -> dict[str, torch.Tensor]:
    given = {"losses": matrix.detach().square().sum(1)} if spec.losses else {}
    return {**given, "second": matrix.flip(1)} if spec.input == "cross_gramian" else given


def made(spec: AggregatorSpec) -> Any:
    seeded = {"generator": torch.Generator().manual_seed(0)} if spec.stochastic else {}
    return jdcore.get_aggregator(spec.name, **spec.example(6), **seeded)


def drawn() -> torch.Tensor:
    return torch.randn(6, 20, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_a_default_device_changes_nothing(spec: AggregatorSpec) -> None:
    matrix = drawn()
    given = given_to(spec, matrix)

    def run() -> torch.Tensor:
        aggregator = made(spec)
        aggregator(matrix, **given)
        if hasattr(aggregator, "state_dict"):
            restored = made(spec)
            restored.load_state_dict(aggregator.state_dict())
            aggregator = restored
        update: torch.Tensor = aggregator(matrix, **given)
        return update

    expected = run()
    with torch.device("meta"):
        update = run()

    assert torch.equal(update, expected)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_rows_from_outside_are_constants_of_a_transform(
    spec: AggregatorSpec, transform: str
) -> None:
    matrix, updates = drawn(), []
    given, of_matrix, of_blocks = given_to(spec, matrix), made(spec), made(spec)
    in_blocks = {**given, "second": [given["second"]]} if "second" in given else given

    def inside(x: torch.Tensor) -> torch.Tensor:
        updates.append(of_matrix(matrix, **given))
        updates.extend(of_blocks.aggregate_blocks([matrix], **in_blocks)[0])
        return updates[0].sum() * x

    TRANSFORMS[transform](inside)

    expected = made(spec)(matrix, **given)
    for update in updates:
        # Where tangents may be, torch multiplies in place of numpy.
        torch.testing.assert_close(update, expected)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("transform", ["vmap", "grad", "functionalize"])
def test_rows_of_a_transform_are_refused_or_differentiated(
    spec: AggregatorSpec, transform: str
) -> None:
    aggregator, matrix = made(spec), drawn()
    state = stateful_part(aggregator)
    before = None if state is None else str(state.state_dict())

    def inside(x: torch.Tensor) -> torch.Tensor:
        rows = x * matrix
        total: torch.Tensor = aggregator(rows, **given_to(spec, rows)).sum()
        return total

    if transform == "grad" and spec.name in ("constant", "mean", "random", "sum"):
        expected = made(spec)(matrix).sum()
        torch.testing.assert_close(TRANSFORMS[transform](inside), expected)
        return
    with pytest.raises(ParameterError, match=r"`(matrix|blocks)` must be made of numbers"):
        TRANSFORMS[transform](inside)
    if state is not None:
        assert str(state.state_dict()) == before


@pytest.mark.parametrize("spec", SCALARIZERS, ids=lambda spec: spec.name)
def test_a_default_device_changes_no_scalarizer(spec: ScalarizerSpec) -> None:
    losses = 0.5 + torch.rand(4, generator=torch.Generator().manual_seed(0))
    arguments = spec.example(4)

    def run() -> torch.Tensor:
        seeded = {"generator": torch.Generator().manual_seed(0)} if spec.stochastic else {}
        scalarizer = jdcore.get_scalarizer(spec.name, **arguments, **seeded)
        scalarizer(losses)
        if spec.advanced_by is not None:
            advance = getattr(scalarizer, spec.advanced_by)
            advance(*[losses][: len(inspect.signature(advance).parameters)])
        if spec.stateful:
            restored = jdcore.get_scalarizer(spec.name, **arguments, **seeded)
            restored.load_state_dict(scalarizer.state_dict())
            scalarizer = restored
        loss: torch.Tensor = scalarizer(losses)
        return loss

    expected = run()
    with torch.device("meta"):
        loss = run()

    assert torch.equal(loss, expected)
