"""How large temporaries are: what ``memory_budget`` allows, beside what has to be there anyway."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from jdcore.autogram import Engine
from tests.core.autogram.oracle import explicit_jacobian, randn, relative_error

B = 16


class _Largest(TorchDispatchMode):
    """The bytes of the largest result of an operation in memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self,
        function: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in self._tensors(result):
            self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result

    def _tensors(self, result: Any) -> Iterator[Tensor]:
        if isinstance(result, Tensor):
            yield result
        elif isinstance(result, (list, tuple)):
            for part in result:
                yield from self._tensors(part)


class _Called(nn.Module):
    """An operation without a closed form, few parameters and large results."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x.pow(self.scale)


class _Derived(nn.Module):
    """A layer whose weight is made of few parameters by way of a larger tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.slopes = nn.Parameter(torch.randn(4, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.slopes * torch.linspace(0.0, 1.0, 128)).tanh().sum(2).T


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "called": (_Called, (B, 64, 8)),
    "derived": (_Derived, (B, 8)),
}


@pytest.mark.parametrize("tasks", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_called_operations_and_pulling_back_heed_the_budget(name: str, tasks: int) -> None:
    make, shape = MODELS[name]
    model, x = make(), randn(*shape).abs()

    def losses() -> Tensor:
        squares = model(x).square().flatten(1)
        return torch.stack([squares.sum(1), squares[:, 1:].sum(1)], 1)[:, :tasks]

    def largest(budget: int) -> int:
        engine = Engine(model, batch_dim=0, memory_budget=budget)
        engine.compute_gramian(losses())  # a first look at the graph takes more
        output = losses()
        with _Largest() as watching:
            found = engine.compute_gramian(output)
        rows = explicit_jacobian(output, list(model.parameters()))
        order = (0, 1, 3, 2)
        matrix = found.permute(*order).reshape(len(rows), -1)
        assert relative_error(matrix, rows @ rows.T) < 1e-12
        return watching.bytes

    # What a step has anyway: the gradients of the batch, and what they are stacked into.
    few = max(1 << 12, model(x).numel() * tasks) * 8
    assert largest(few // tasks) <= few
    assert largest(1 << 30) >= 8 * few // tasks


@pytest.mark.parametrize("budget", [4_000, 10_000, 30_000, 100_000, 1_000_000])
def test_layers_that_are_multiplied_in_pieces_of_different_sizes(budget: int) -> None:
    model = nn.Sequential(
        *(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(64, 64, 3, padding=1, stride=2), nn.Flatten(), nn.Linear(256, 1)),
    ).float()
    losses = model(randn(B, 64, 4, 4).float()).squeeze(1)
    gramian = Engine(model, batch_dim=0, memory_budget=budget).compute_gramian(losses)
    rows = explicit_jacobian(losses, list(model.parameters())).double()
    assert relative_error(gramian, rows @ rows.T) < 1e-5


class _Positions(nn.Module):
    """Rows that are as large as the gradients of samples, and are multiplied in float64 too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Parameter(torch.randn(1, 64, 128)), nn.Linear(128, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.table)


COARSE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "positions": (_Positions, (B, 64, 128)),
    "sequences": (lambda: nn.Sequential(nn.Linear(64, 128), nn.ReLU()), (B, 32, 64)),
    "long sequences": (lambda: nn.Sequential(nn.Linear(32, 32), nn.Tanh()), (4, 512, 32)),
}


@pytest.mark.parametrize("name", COARSE)
def test_products_in_float64_heed_the_budget(name: str) -> None:
    make, shape = COARSE[name]
    model, x = make().float(), randn(*shape).float()

    def losses() -> Tensor:
        squares = model(x).square().flatten(1)
        return torch.stack([squares.sum(1), squares[:, 1:].sum(1)], 1)  # nearly the same rows

    def largest(step: Callable[[], object]) -> int:
        step()  # a first look at the graph takes more
        with _Largest() as watching:
            step()
        return watching.bytes

    weights = torch.ones_like(losses().detach())
    engine = Engine(model, batch_dim=0, memory_budget=1 << 18)
    plain = largest(lambda: losses().backward(weights))
    ours = largest(lambda: engine.backward(losses(), lambda _: weights))
    # Two tasks have twice the gradients of one, and their rows a bias beside.
    assert ours <= 1.01 * max(1 << 18, 2 * plain)
