"""Methods give on a device what they give on the CPU, and leave it there."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import jdcore
from jdcore import AggregatorSpec
from jdcore.errors import UnsolvedWarning
from jdcore.linalg import combine
from jdcore.linalg._combine import combine_blocks, factors
from jdcore.testing import _laws, _scalarizers, family
from jdcore.testing._case import Case
from jdcore.testing._scalarizers import ScalarizerCase
from tests.standin.conftest import NAME

SPECS = [spec for plugin in jdcore.list_plugins() for spec in plugin.aggregators]


def updates(spec: AggregatorSpec, matrix: Tensor) -> list[Tensor]:
    """Of two calls, as many methods remember the one before."""
    given: dict[str, Any] = {"losses": matrix.square().sum(1)} if spec.losses else {}
    if spec.input == "cross_gramian":
        given["second"] = matrix.flip(1)
    seeded = {"generator": torch.Generator("cpu").manual_seed(0)} if spec.stochastic else {}
    example = spec.example(len(matrix)).items()
    arguments = {k: v.to(matrix.device) if isinstance(v, Tensor) else v for k, v in example}
    aggregator = jdcore.get_aggregator(spec.name, **arguments, **seeded)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnsolvedWarning)
        return [aggregator(matrix, **given) for _ in range(2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("kind", "m"),
    [
        ("conflict", 5),
        pytest.param("gauss", 20, marks=pytest.mark.slow),
        pytest.param("rankdef", 150, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_updates_are_those_of_the_cpu(
    spec: AggregatorSpec, kind: str, m: int, dtype: torch.dtype
) -> None:
    with torch.device("cpu"):
        matrix = family(kind, m, 2 * m, generator=torch.Generator().manual_seed(0)).to(dtype)
    scale = float(matrix.abs().max())
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    expected = updates(spec, matrix)
    for update, wanted in zip(updates(spec, matrix.to(NAME)), expected, strict=True):
        assert update.device.type == NAME
        assert update.dtype == wanted.dtype
        torch.testing.assert_close(update.cpu(), wanted, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_methods_obey_the_law_of_accelerators(spec: AggregatorSpec) -> None:
    _laws.works_on_accelerators(Case(spec.name))


@pytest.mark.parametrize("name", jdcore.list_scalarizers())
def test_scalarizers_obey_the_law_of_accelerators(name: str) -> None:
    _scalarizers.works_on_accelerators(ScalarizerCase(name))


@pytest.mark.parametrize("here", ["cpu", NAME])
def test_weights_are_not_rounded_on_their_way_to_rows_of_float64(here: str) -> None:
    blocks = [torch.randn(4, n, dtype=torch.float64) for n in (50, 5)]
    weights = torch.rand(4, dtype=torch.float64, device=here)
    expected = [weights.cpu() @ block.cpu() for block in blocks]
    for found, wanted in zip(combine_blocks(weights, blocks), expected, strict=True):
        torch.testing.assert_close(found.cpu(), wanted, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("here", ["cpu", NAME])
def test_weights_that_float32_does_not_hold_are_multiplied_in_float64(here: str) -> None:
    weights = torch.tensor([1e40, 1e-40], dtype=torch.float64, device=here)
    block = torch.tensor([[1e-20, 0.0], [0.0, 1e20]])
    expected = torch.tensor([1e20, 1e-20])
    torch.testing.assert_close(combine(weights, block), expected)
    for found in combine_blocks(weights, [block, block]):
        torch.testing.assert_close(found, expected)
    assert factors(weights, block.device, wide=False).dtype == torch.float64
    assert factors(weights.clamp(1e-3, 1e3), block.device, wide=False).dtype == torch.float32
