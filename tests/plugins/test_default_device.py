"""Methods work on the device of their matrix, whatever the user has made the default."""

from __future__ import annotations

import pytest
import torch

import jdcore
from jdcore import AggregatorSpec

SPECS = [spec for plugin in jdcore.list_plugins() for spec in plugin.aggregators]


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
