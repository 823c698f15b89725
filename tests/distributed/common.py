"""What the checks share: a small model, the batches of all processes, and comparisons."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import jdcore
from jdcore.autojac import backward, jac, jac_to_grad, zero_jac

TASKS, WIDTH = 3, 5


class Tasks(nn.Module):
    """A trunk and a head for each task."""

    def __init__(self, dtype: torch.dtype = torch.float64, tasks: int = TASKS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 4))
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(tasks))
        self.to(dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = self.trunk(x)
        return features, [head(features) for head in self.heads]


def losses_of(outputs: list[Tensor]) -> list[Tensor]:
    return [(o**2).mean() * (i + 1) + (o + 1).square().mean() for i, o in enumerate(outputs)]


def batch(rank: int, step: int = 0, dtype: torch.dtype = torch.float64, size: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(size, WIDTH, generator=generator, dtype=torch.float64).to(dtype)


def own_batch(step: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return batch(dist.get_rank(), step, dtype)


def whole_batch(step: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.cat([batch(rank, step, dtype) for rank in range(dist.get_world_size())])


def full(tensor: Tensor) -> Tensor:
    whole: Any = tensor
    return (whole.full_tensor() if hasattr(whole, "full_tensor") else whole).detach()


def assert_close(
    ours: Iterable[Tensor], theirs: Iterable[Tensor], tolerance: float = 1e-12
) -> None:
    """Equal up to a tolerance, relative to the largest entry."""
    one, other = (
        torch.cat([full(tensor).reshape(-1).double() for tensor in given])
        for given in (ours, theirs)
    )
    error = float((one - other).abs().max() / other.abs().max().clamp_min(1e-300))
    assert error <= tolerance, f"relative error {error:.1e}"


def gradients(module: nn.Module) -> list[Tensor]:
    return [p.grad for p in module.parameters() if p.grad is not None]


def assert_identical(tensors: Iterable[Tensor]) -> None:
    """The same bits on all processes."""
    flat = torch.cat([full(tensor).reshape(-1) for tensor in tensors])
    others = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(others, flat)
    assert all(torch.equal(flat, other) for other in others)


def refused(
    error: type[Exception], match: str, call: Callable[..., Any], *arguments: Any, **keywords: Any
) -> None:
    with pytest.raises(error, match=match):
        call(*arguments, **keywords)


def method_of(name: str, tasks: int) -> Any:
    """The method with its example arguments, and random numbers that start at the same place."""
    spec = jdcore.describe(name)
    arguments = dict(spec.example(tasks))
    if spec.stochastic:
        arguments["generator"] = torch.Generator().manual_seed(3)
    return jdcore.get_aggregator(name, **arguments)


def compare_every_method(
    wrap: Callable[[nn.Module], nn.Module],
    check: Callable[[nn.Module, nn.Module, float], None],
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    """
    Two steps of each method, on several processes and on the whole batch.

    The rows are computed once for all methods: what is tried is how they are aggregated.

    :param wrap: Spreads a model over the processes.
    :param check: Compares the gradients of both models up to a tolerance.
    """
    names: dict[int, list[str]] = {}
    for name in jdcore.list_aggregators():
        names.setdefault(max(TASKS, jdcore.describe(name).min_rows), []).append(name)
    for tasks, some in names.items():
        models = wrap(Tasks(dtype, tasks)), Tasks(dtype, tasks)
        methods = {name: (method_of(name, tasks), method_of(name, tasks)) for name in some}
        for step in range(2):  # the second with what the first left in a state
            rows = [_rows(*pair, step, dtype) for pair in zip(models, BATCHES, strict=True)]
            for name, pair in methods.items():
                try:
                    _aggregate(name, models, pair, rows, tolerance)
                    check(*models, tolerance)
                except AssertionError as error:
                    raise AssertionError(f"{name}, step {step}") from error
                for model in models:
                    model.zero_grad()
            for model in models:
                zero_jac(model.parameters())


BATCHES = (own_batch, whole_batch)


def _rows(
    model: nn.Module, of: Callable[..., Tensor], step: int, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """Leave the rows in ``.jac``; the losses, and the rows of a second batch."""
    second = jac(losses_of(model(of(step + 50, dtype))[1]), list(model.parameters()))
    losses = losses_of(model(of(step, dtype))[1])
    backward(losses)
    return losses, list(second)


def _aggregate(
    name: str,
    models: tuple[nn.Module, nn.Module],
    methods: tuple[Any, Any],
    rows: list[tuple[list[Tensor], list[Tensor]]],
    tolerance: float,
) -> None:
    found = []
    for model, method, (losses, second) in zip(models, methods, rows, strict=True):
        known = {"second": second} if jdcore.describe(name).input == "cross_gramian" else {}
        parameters = list(model.parameters())
        found.append(jac_to_grad(parameters, method, losses=losses, retain_jac=True, **known))
    if found[1] is not None:
        assert_close(found[:1], found[1:], 10 * tolerance)
