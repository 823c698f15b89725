"""Methods work on the device of what they are given, whatever the user has made the default."""

from __future__ import annotations

import inspect

import pytest
import torch

import jdcore
from jdcore import AggregatorSpec, ScalarizerSpec

SPECS = [spec for plugin in jdcore.list_plugins() for spec in plugin.aggregators]
# Those that are modules make their parameters on the default device, as all modules do.
SCALARIZERS = [s for p in jdcore.list_plugins() for s in p.scalarizers if not s.trainable]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_a_default_device_changes_nothing(spec: AggregatorSpec) -> None:
    matrix = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    given = {"losses": matrix.square().sum(1)} if spec.losses else {}
    if spec.input == "cross_gramian":
        given["second"] = matrix.flip(1)
    arguments = spec.example(6)

    def run() -> torch.Tensor:
        seeded = {"generator": torch.Generator().manual_seed(0)} if spec.stochastic else {}
        aggregator = jdcore.get_aggregator(spec.name, **arguments, **seeded)
        aggregator(matrix, **given)
        if hasattr(aggregator, "state_dict"):
            restored = jdcore.get_aggregator(spec.name, **arguments, **seeded)
            restored.load_state_dict(aggregator.state_dict())
            aggregator = restored
        update: torch.Tensor = aggregator(matrix, **given)
        return update

    expected = run()
    with torch.device("meta"):
        update = run()

    assert torch.equal(update, expected)


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
