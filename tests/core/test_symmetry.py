"""
Every Gramian that a weighting is handed is symmetric to the last bit, on any machine.

Products ``A @ A.T`` are not: libraries of linear algebra may sum the two halves in another order.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from jdcore.aggregation import GramianAggregator
from jdcore.autogram import Engine
from jdcore.autojac import backward, gramian_backward, jac_to_grad
from jdcore.linalg import flatten_gramian, gramian

SHAPES = [(2, 3), (5, 999), (37, 1000), (129, 333), (257, 64)]


class Witness:
    """Equal weights, and the Gramians they were asked for."""

    def __init__(self) -> None:
        self.gramians: list[Tensor] = []

    def __call__(self, gramian: Tensor, /) -> Tensor:
        self.gramians.append(gramian.clone())
        return torch.full((len(gramian),), 1.0 / len(gramian), dtype=gramian.dtype)

    def check(self) -> None:
        assert self.gramians
        for seen in self.gramians:
            assert torch.equal(seen, seen.T)


def _normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_gramian_of_a_matrix(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix, witness = _normal(*shape, dtype=dtype), Witness()
    product = gramian(matrix)
    GramianAggregator(witness)(matrix)
    GramianAggregator(witness).aggregate_blocks([matrix, matrix[:, : shape[1] // 2 + 1]])

    assert torch.equal(product, product.T)
    witness.check()


def _perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 130), nn.Tanh(), nn.LayerNorm(130), nn.Linear(130, 3))


def _convolutions() -> nn.Module:
    layers = [nn.Conv2d(2, 5, 3), nn.GroupNorm(1, 5), nn.Flatten(), nn.Linear(50, 3)]
    return nn.Sequential(
        nn.Unflatten(1, (2, 10)), nn.Unflatten(2, (5, 2)), nn.ZeroPad2d(1), *layers
    )


def _sequences() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (5, 4)), nn.Linear(4, 9), nn.ReLU(), nn.Flatten(), nn.Linear(45, 3)
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "perceptron": _perceptron,
    "convolutions": _convolutions,
    "sequences": _sequences,
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gramian_of_the_engine(model: str, batch_dim: int | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    network = MODELS[model]().to(dtype)
    engine, witness = Engine(network, batch_dim=batch_dim), Witness()
    samples = 65 if batch_dim == 0 else 9
    for _ in range(2):  # the first step may take another path than later ones
        losses = network(_normal(samples, 20, dtype=dtype)).square()
        product = flatten_gramian(engine.compute_gramian(losses))
        assert torch.equal(product, product.T)
        losses = network(_normal(samples, 20, dtype=dtype)).square().sum(1)
        engine.backward(losses, witness)

    witness.check()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gramian_without_the_jacobian_and_the_one_of_its_blocks(
    model: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    network, witness = MODELS[model]().to(dtype), Witness()
    inputs = _normal(33, 20, dtype=dtype)

    gramian_backward(network(inputs).square().sum(1), witness)
    backward(network(inputs).square().sum(1))
    jac_to_grad(network.parameters(), GramianAggregator(witness))

    assert len(witness.gramians) == 2
    witness.check()
