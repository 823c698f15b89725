"""
Tensors of any shape, whose dimensions move, split and merge on their way to the losses.

Dimensions have two to four entries, so that those of samples are often as long as others, and any
dimension of the result may be that of the samples. The same programs run again on other data, other
indices and another number of samples, so that plans which were kept are tried as well.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from attrs import define, field
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from jdcore import JDCoreError, autogram
from tests.zoo.specimen import as_matrix, cleared, gathered, rows_of, weights_for

TOLERANCE = 1e-10
_MOST = 400
"""Entries of a tensor."""


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float, scale: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, scale)
        ctx.factor = factor
        return factor * x * scale, x + scale

    @staticmethod
    def backward(ctx: Any, of_product: Tensor, of_sum: Tensor) -> tuple[Tensor, None, Tensor]:
        x, scale = ctx.saved_tensors
        of_product = ctx.factor * of_product
        of_scale = (of_product * x + of_sum).sum_to_size(scale.shape)
        return of_product * scale + of_sum, None, of_scale


@define
class Draw:
    """
    What a program draws.

    :param structure: Decides what belongs to the program.
    :param data: Decides what changes from run to run.
    :param parameters: Those of the program, made when they are first asked for.
    """

    structure: random.Random
    data: random.Random
    parameters: dict[tuple[object, ...], Tensor] = field(factory=dict)

    def parameter(self, *shape: int) -> Tensor:
        """One of two of this shape."""
        key = (self.structure.randrange(2), *shape)
        if key not in self.parameters:
            generator = torch.Generator().manual_seed(len(self.parameters))
            made = 0.7 * torch.randn(shape, dtype=torch.float64, generator=generator)
            self.parameters[key] = made.requires_grad_()
        return self.parameters[key]

    def broadcast(self, like: Tensor) -> Tensor:
        """One that some dimensions of a tensor share."""
        return self.parameter(*[n if self.structure.random() < 0.5 else 1 for n in like.shape])

    def dim(self, x: Tensor) -> int:
        return self.structure.randrange(x.ndim)

    def order(self, length: int) -> Tensor:
        return torch.tensor(self.data.sample(range(length), length))


Operation = Callable[[Tensor, Draw], Tensor]


def _merged(x: Tensor, draw: Draw) -> Tensor:
    first = draw.structure.randrange(max(1, x.ndim - 1))
    return x.flatten(first, first + 1) if x.ndim > 1 else x


def _split(x: Tensor, draw: Draw) -> Tensor:
    dim = draw.dim(x)
    factor = next((n for n in (2, 3) if x.shape[dim] % n == 0), 1)
    sizes = (factor, -1) if draw.structure.random() < 0.5 else (-1, factor)
    return x.unflatten(dim, sizes) if x.ndim < 5 else x  # type: ignore[no-untyped-call]


def _along(x: Tensor, draw: Draw) -> Tensor:
    moved = x.movedim(draw.dim(x), -1)
    return moved @ draw.parameter(moved.shape[-1], moved.shape[-1])


def _from_the_left(x: Tensor, draw: Draw) -> Tensor:
    return draw.parameter(x.shape[-2], x.shape[-2]) @ x if x.ndim > 1 else x


def _experts(x: Tensor, draw: Draw) -> Tensor:
    if x.ndim < 2:
        return x
    batch = x.reshape(-1, x.shape[-2], x.shape[-1])
    weights = draw.parameter(len(batch), x.shape[-1], x.shape[-1])
    return torch.bmm(batch, weights).reshape(x.shape)


def _convolved(x: Tensor, draw: Draw) -> Tensor:
    channels = x.shape[-2] if x.ndim > 1 else 1
    images = x.reshape(-1, channels, x.shape[-1])
    kernel, bias = draw.parameter(channels, channels, 3), draw.parameter(channels)
    return F.conv1d(images, kernel, bias, padding=1).reshape(x.shape)


def _entry_by_entry(x: Tensor, draw: Draw) -> Tensor:
    dim = draw.dim(x)
    return torch.stack([x.select(dim, i).tanh() for i in range(x.shape[dim])], dim)


def _in_place(x: Tensor, draw: Draw) -> Tensor:
    dim, found = draw.dim(x), x.clone()
    found.select(dim, 0).add_(x.select(dim, -1) * draw.parameter(1))
    return found


def _looked_up(x: Tensor, draw: Draw) -> Tensor:
    places = [draw.data.randrange(3) for _ in range(x[..., 0].numel())]
    return x * F.embedding(torch.tensor(places).view(x.shape[:-1]), draw.parameter(3, x.shape[-1]))


def _checkpointed(x: Tensor, draw: Draw) -> Tensor:
    weight = draw.parameter(x.shape[-1], x.shape[-1])
    found: Tensor = checkpoint(lambda y: (y @ weight.T).tanh(), x, use_reentrant=False)
    return found


def _function(x: Tensor, draw: Draw) -> Tensor:
    chosen = draw.structure.randrange(2)
    found: Tensor = _Scaled.apply(x, 2.0, draw.parameter(x.shape[-1]))[chosen]  # type: ignore[no-untyped-call]
    return found


OPERATIONS: list[Operation] = [
    lambda x, d: x.permute(d.structure.sample(range(x.ndim), x.ndim)),
    _merged,
    _split,
    lambda x, d: x @ d.parameter(x.shape[-1], x.shape[-1]),
    lambda x, d: F.linear(x, d.parameter(x.shape[-1], x.shape[-1]), d.parameter(x.shape[-1])),
    _along,
    _from_the_left,
    _experts,
    _convolved,
    lambda x, d: x * d.broadcast(x),
    lambda x, d: (x + d.broadcast(x)).tanh(),
    lambda x, d: torch.where(x > 0, x, d.parameter(1)),
    lambda x, d: F.layer_norm(x, x.shape[-1:], d.parameter(x.shape[-1]), d.parameter(x.shape[-1])),
    lambda x, d: x.softmax(d.dim(x)),
    lambda x, d: x.cumsum(d.dim(x)),
    lambda x, d: x.flip(d.dim(x)),
    lambda x, d: x + x.mean(d.dim(x), keepdim=True),
    lambda x, d: (x @ x.mT).softmax(-1) @ x if x.ndim > 1 else x,
    lambda x, d: (lambda dim: x.index_select(dim, d.order(x.shape[dim])))(d.dim(x)),
    lambda x, d: (lambda dim: torch.cat([x, x.sin()], dim).narrow(dim, 1, x.shape[dim]))(d.dim(x)),
    _entry_by_entry,
    _in_place,
    _looked_up,
    _checkpointed,
    _function,
]


def _losses(seed: int, data: int, samples: int, parameters: dict[Any, Tensor]) -> Tensor:
    """Losses [B] or [B, 2] of one run of a program."""
    structure = random.Random(seed)
    draw = Draw(structure, random.Random(f"{seed} {data}"), parameters)
    sizes = samples, structure.choice([2, 3, 4]), structure.choice([2, 3, 4])
    generator = torch.Generator().manual_seed(data)
    x = torch.randn(sizes, dtype=torch.float64, generator=generator)
    x = x @ draw.parameter(sizes[2], sizes[2])
    for _ in range(structure.randint(2, 8)):
        found = structure.choice(OPERATIONS)(x, draw)
        x = found if found.numel() <= _MOST else x
    of_samples = x.movedim(draw.dim(x), 0).reshape(-1, 1) if x.ndim == 1 else x
    of_samples = of_samples.movedim(structure.randrange(of_samples.ndim), 0).flatten(1)
    first = (of_samples * torch.linspace(0.5, 1.5, of_samples.shape[1]).double()).sum(1)
    if structure.random() < 0.6:
        return first
    return torch.stack([first, of_samples.square().mean(1)], 1)


def _complaint(losses: Callable[[], Tensor], parameters: Sequence[Tensor]) -> str | None:
    rows = rows_of(losses(), parameters)
    lengths = rows.norm(dim=1).clamp(min=1e-6)
    for batch_dim in (0, None):
        output = losses()
        weights = weights_for(output)
        try:
            gramian = autogram.gramian(output, inputs=parameters, batch_dim=batch_dim)
            autogram.backward(
                output, lambda _, w=weights: w, inputs=parameters, batch_dim=batch_dim
            )
        except JDCoreError:
            if batch_dim is None or gathered(parameters).count_nonzero():
                return "refused without samples, or too late"
            continue
        update = gathered(parameters)
        cleared(parameters)
        error = (as_matrix(gramian, output.ndim) - rows @ rows.T).abs()
        if bool((error > TOLERANCE * lengths[:, None] * lengths).any()):
            return f"batch_dim={batch_dim}: wrong Gramian"
        scale = (weights.reshape(-1).abs()[:, None] * rows.abs()).sum().clamp(min=1e-6)
        if bool((update - weights.reshape(-1) @ rows).abs().max() > TOLERANCE * scale):
            return f"batch_dim={batch_dim}: wrong gradient"
    return None


def _complaints(first: int, last: int) -> list[str]:
    found = []
    for seed in range(first, last):
        parameters: dict[Any, Tensor] = {}
        runs = [(0, 3), (1, 3), (2, 4), (3, 3)]
        for data, samples in runs:  # all parameters have to be there before the first comparison
            _losses(seed, data, samples, parameters)
        for data, samples in runs:
            run = partial(_losses, seed, data, samples, parameters)
            complaint = _complaint(run, list(parameters.values()))
            if complaint:
                found.append(f"program {seed}, data {data}: {complaint}")
    return found


def test_random_shapes_are_right_or_refused() -> None:
    assert _complaints(0, 30) == []


@pytest.mark.slow
@pytest.mark.parametrize("part", range(5))
def test_many_random_shapes_are_right_or_refused(part: int) -> None:
    assert _complaints(1000 * (part + 1), 1000 * (part + 1) + 150) == []
