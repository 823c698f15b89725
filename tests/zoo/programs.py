"""Random programs on a batch: some keep samples apart, some move them, some mix them."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from attrs import define
from torch import Tensor
from torch.nn import functional as F

D = 3
"""Features of a sample in each tensor of a program."""


@define
class Draw:
    """What one run of a program draws: parameters are kept, indices and data change."""

    parameters: list[Tensor]
    chance: random.Random
    b: int

    def weight(self) -> Tensor:
        return self.chance.choice(self.parameters[:2])

    def vector(self) -> Tensor:
        return self.chance.choice(self.parameters[2:4])

    @property
    def table(self) -> Tensor:
        return self.parameters[4]

    def order(self) -> Tensor:
        return torch.tensor(self.chance.sample(range(self.b), self.b))

    def picks(self) -> Tensor:
        """Samples, some of them more than once."""
        return torch.tensor([self.chance.randrange(self.b) for _ in range(self.b)])

    def sample(self) -> int:
        return self.chance.randrange(self.b)

    def factors(self) -> Tensor:
        """One factor per sample, one of them zero or huge at times."""
        factors = torch.ones(self.b, 1, dtype=torch.float64)
        factors[self.sample()] = self.chance.choice([0.0, 1e6, -2.0])
        return factors


Operation = Callable[[Tensor, Tensor, Draw], Tensor]


def _into_a_column(x: Tensor, y: Tensor, draw: Draw) -> Tensor:
    z = x.clone()
    z[:, 0] = y[:, 1] * draw.vector()[0]
    z[:, 1:] += y[:, :2]
    return z


def _swapped_in_place(x: Tensor, _y: Tensor, draw: Draw) -> Tensor:
    z = x.clone()
    z[draw.order()] = x
    return z


def _scattered(x: Tensor, _y: Tensor, draw: Draw) -> Tensor:
    order = draw.order()[:, None].expand(-1, D)
    return torch.zeros_like(x).scatter(0, order, x)


def _convolved(x: Tensor, _y: Tensor, draw: Draw) -> Tensor:
    return F.conv1d(x[:, None], draw.weight()[None, :1], draw.vector()[:1], padding=1)[:, 0]


def _looked_up(x: Tensor, _y: Tensor, draw: Draw) -> Tensor:
    index = torch.tensor([draw.chance.randrange(4) for _ in range(draw.b)])
    return x + F.embedding(index, draw.table)


APART: list[Operation] = [
    lambda x, _, d: x @ d.weight(),
    lambda x, _, d: F.linear(x, d.weight(), d.vector()),
    lambda x, y, d: torch.einsum("bi,ij,bj->bi", x, d.weight(), y),
    lambda x, y, d: (torch.bmm(x[:, :, None], y[:, None]) @ d.weight()).sum(2),
    lambda x, _, d: x.tanh(),
    lambda x, _, d: x.relu() + d.vector(),
    lambda x, _, d: x * d.vector(),
    lambda x, y, d: x + 0.5 * y,
    lambda x, y, d: x * y.sin(),
    lambda x, _, d: F.layer_norm(x, (D,), d.vector(), d.vector()),
    lambda x, _, d: x.roll(d.chance.randrange(3), 1),
    lambda x, _, d: x.flip(1),
    lambda x, _, d: x[:, [2, 0, 0]],
    lambda x, _, d: x.cumsum(1),
    lambda x, _, d: x.softmax(1),
    lambda x, _, d: x.sort(1).values,
    lambda x, _, d: (d.weight() @ x.T).T,
    lambda x, y, d: torch.stack([x, y], 2).flatten(1)[:, 1:4],
    lambda x, y, d: torch.cat([x, y], 1).view(d.b, 2, D).amax(1),
    lambda x, y, d: torch.cat([x, y]).tanh().view(2, d.b, D).sum(0),
    lambda x, y, d: torch.where(x > 0, x, y),
    lambda x, _, d: x * d.factors(),
    lambda x, _, d: x[None].expand(2, -1, -1).reshape(-1, D).view(2, -1, D).mean(0),
    lambda x, _, d: x + d.table[0] * d.table[1:2].expand(d.b, -1),
    _into_a_column,
    _convolved,
    _looked_up,
]

MOVING: list[Operation] = [
    lambda x, _, d: x[d.order()],
    lambda x, _, d: x.flip(0),
    lambda x, _, d: x.roll(d.chance.randrange(d.b), 0),
    lambda x, _, d: x.index_select(0, d.order()),
    lambda x, _, d: x.gather(0, d.order()[:, None].expand(-1, D)),
    lambda x, _, d: torch.cat([x[1:], x[:1]]),
    lambda x, _, d: x.T[:, d.order()].T,
    lambda x, _, d: torch.stack([x[i] for i in d.order()]),
    lambda x, _, d: torch.cat(x.split(2)[::-1]),
    lambda x, _, d: x[x[:, 0].argsort()],
    lambda x, _, d: torch.zeros_like(x).index_add(0, d.order(), x),
    lambda x, _, d: F.embedding(d.order(), x),
    _swapped_in_place,
    _scattered,
]


def _one_row_of_two(x: Tensor, _y: Tensor, draw: Draw) -> Tensor:
    z = x.clone()
    i = draw.sample()
    z[i] = x[i] - x[draw.sample()]
    return z


def _in_time_order(x: Tensor, _y: Tensor, draw: Draw) -> Tensor:
    """Another order of all numbers, samples and features together."""
    order = torch.tensor(draw.chance.sample(range(draw.b * D), draw.b * D))
    return x.flatten()[order].view(draw.b, D)


def _slice_in_place(x: Tensor, y: Tensor, draw: Draw) -> Tensor:
    z = x.clone()
    z[1:] += y[:-1]
    return z


MIXING: list[Operation] = [
    lambda x, _, d: x[d.picks()],
    lambda x, y, d: x + y[d.order()],
    lambda x, _, d: x - x.mean(0),
    lambda x, _, d: x.cumsum(0),
    lambda x, _, d: torch.zeros_like(x).index_add(0, d.picks(), x),
    lambda x, y, d: x @ (y.T @ x),
    lambda x, _, d: x.softmax(0),
    lambda x, _, d: x - x.amax(0),
    lambda x, _, d: x.sort(0).values,
    lambda x, y, d: (x @ y.T).softmax(1) @ y,
    lambda x, _, d: x * x[d.sample()],
    lambda x, _, d: x.reshape(-1).roll(d.chance.randrange(1, 4)).view(d.b, D),
    lambda x, _, d: x.T.reshape(d.b, D),
    lambda x, _, d: F.conv1d(x.T[None], d.weight()[:, :, None].expand(-1, -1, 3), padding=1)[0].T,
    lambda x, _, d: x.gather(0, torch.stack([d.order(), d.order(), d.picks()], 1)),
    lambda x, _, d: x.lerp(x.flip(0), 1e-7),
    lambda x, _, d: x * d.factors() + x.roll(1, 0) * d.factors(),
    _one_row_of_two,
    _in_time_order,
    _slice_in_place,
]


@define
class Program:
    """
    Operations on the latest tensor and an earlier one, then losses of two tensors.

    :param forgets: Whether tensors from before samples moved are not used any more.
    """

    operations: list[Operation]
    b: int
    zero_sum: bool
    two_tasks: bool
    forgets: bool
    seed: int

    @property
    def apart(self) -> bool:
        """Whether no operation mixes samples, so that an engine has no reason to refuse."""
        used = set(self.operations)
        return not used & set(MIXING) and (self.forgets or not used & set(MOVING))

    def run(self, parameters: list[Tensor], data: int) -> Tensor:
        """[B] or [B, 2] losses; other data means other inputs and indices, the same operations."""
        chance = random.Random(f"{self.seed} {data}")
        generator = torch.Generator().manual_seed(chance.randrange(1 << 30))
        draw = Draw(parameters, chance, self.b)
        x = torch.randn(self.b, D, dtype=torch.float64, generator=generator)
        seen = [x, x @ parameters[0]]
        # Choices of operands belong to the program, those of indices to the data.
        structure = random.Random(self.seed)
        for operation in self.operations:
            result = operation(seen[-1], structure.choice(seen), draw)
            seen = [result] if self.forgets and operation in MOVING else [*seen, result]
        loss = (seen[-1] * torch.tensor([1.0, -2.0, 0.5], dtype=x.dtype)).sum(1)
        other = -loss if self.zero_sum else structure.choice(seen[-2:]).square().sum(1)
        return torch.stack([loss, other], 1) if self.two_tasks else loss


def program(seed: int) -> Program:
    chance = random.Random(seed)
    b = chance.randint(1, 8)
    kinds = chance.choice([[APART], [APART, MOVING], [APART, MOVING], [APART, MOVING, MIXING]])
    length = chance.randint(1, 7)
    # Mostly what keeps samples apart, so that others often come alone.
    chosen = [chance.choice(chance.choice([APART, *kinds])) for _ in range(length)]
    zero_sum, two_tasks, forgets = (chance.random() < 0.5 for _ in range(3))
    return Program(chosen, b, zero_sum, two_tasks, forgets, seed)


def parameters_of(seed: int) -> list[Tensor]:
    """Two matrices, two vectors and a table."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(D, D), (D, D), (D,), (D,), (4, D)]
    made = [torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in shapes]
    return [p.requires_grad_() for p in made]
