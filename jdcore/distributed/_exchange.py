"""
The Gramian of samples that lie on several processes, from the shares that each has of its own.

The product of two samples needs both, so what shares are made of has to meet. Of a share in factors
(inputs and gradients of a linear layer) those of all processes go to one of them, which computes
the share of the whole; different shares go to different processes. Of a share in rows each process
gets some columns. Whichever sends fewer bytes is chosen, share by share. What the processes found
is added up at last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from jdcore.distributed._meeting import Group, Meeting, Stage, number_of
from jdcore.errors import ParameterError
from jdcore.graph import Accumulator, Dense, Objectives, Share
from jdcore.graph._cancelling import multiplied
from jdcore.graph._memory import Memory
from jdcore.graph.shares import Addend
from jdcore.linalg._gramian import symmetric

# Bytes that a process sends at once.
_BYTES = 64 << 20


class Collected(Accumulator):
    """Keeps shares until those of all processes can be brought together."""

    def __init__(self, objectives: Objectives, device: torch.device, memory: Memory) -> None:
        # Without a matrix: nothing is added up before the shares of all processes have met.
        super().__init__(0, device, True, memory)
        # Which layers come together depends on the memory of a process.
        self.joins = False
        self.rows = objectives.rows
        self.device = device
        self.shares: list[Share] = []
        self.names: list[Any] = []
        """What tells each share from the others, the same on all processes."""

    def add_share(self, share: Addend) -> None:
        assert isinstance(share, Share)  # as nothing joins
        self.shares.append(share)


class Union:
    """
    The losses of all processes, one after the other along the dimension of samples.

    :param meeting: The processes.
    :param group: These, as a group.
    :param objectives: The losses of this process.
    :raises ParameterError: If the losses of the processes cannot be put together.
    """

    def __init__(self, meeting: Meeting, group: Group, objectives: Objectives) -> None:
        self.meeting, self.group = meeting, group
        self._dimension = objectives.batch_dim or 0
        # One tensor: with a dimension of samples there are no several outputs.
        [output] = objectives.outputs
        shape = list(output.shape)
        shape[self._dimension] = 0
        if not meeting.agree_on(Stage.SAMPLES, shape, output.dtype, self._dimension):
            raise ParameterError(
                "output",
                "losses of the same shape on all processes but for the number of samples",
                f"losses of shape {list(output.shape)} here, others elsewhere",
            )
        self.samples = _gathered(objectives.samples, meeting, group)
        """Number of samples on each process."""
        shape[self._dimension] = sum(self.samples)
        self.shape = torch.Size(shape)
        """Shape of all losses."""
        # A tensor that stands for the losses of all: only its shape is asked for, and nobody has
        # its values.
        self.objectives = Objectives([torch.empty(shape, device="meta")], self._dimension)
        self.rank = dist.get_rank(group)

    def own(self, values: Tensor) -> Tensor:
        """Those of the values of all losses that belong to the losses of this process."""
        start = sum(self.samples[: self.rank])
        shaped = values.reshape(self.shape)
        return shaped.narrow(self._dimension, start, self.samples[self.rank]).reshape(-1)

    def values(self, own: Tensor) -> Tensor:
        """The values of all losses, flattened, from those of this process."""
        moved = own.detach().movedim(self._dimension, 0)
        # An all-gather takes equal sizes; what fills up is cut off again below.
        sent = moved.new_zeros(max(self.samples), *moved.shape[1:])
        sent[: len(moved)] = moved
        received = [torch.empty_like(sent) for _ in self.samples]
        self.meeting.agree(Stage.LOSSES)
        dist.all_gather(received, sent, group=self.group)
        parts = [part[:count] for part, count in zip(received, self.samples, strict=True)]
        return torch.cat(parts).movedim(0, self._dimension).reshape(-1)

    def gramian(self, collected: Collected, precision: torch.dtype) -> Tensor:
        """
        The Gramian of all losses, float64.

        :param collected: The shares of this process.
        :param precision: What their rows were rounded to.
        :raises ParameterError: If the processes have shares of different graphs.
        """
        gramian, _ = multiplied(
            self.objectives.rows,
            precision,
            lambda: self._added_up(collected),
            # Not each by itself: Gramians of processes may differ in their last bits, and a process
            # that repeats the exchange alone waits for ever.
            lambda cancel: self.meeting.agree(Stage.GRAMIAN, int(cancel)) != [0],
        )
        return self.objectives.ordered(gramian)

    def _added_up(self, collected: Collected) -> tuple[Tensor, bool]:
        total = Accumulator(self.objectives.rows, collected.device, False, collected.memory)
        for items in _rounds(self._items(collected.shares, collected.names)):
            # Round by round, so that no more than what is sent at once is in memory twice.
            for share in self._exchanged(items):
                total.add_share(share)
        own, cancelled = total.result()
        # Sums of three processes need not be taken in the same order in both triangles.
        return symmetric(self.meeting.total(Stage.GRAMIAN, own)), cancelled

    def _items(self, shares: Sequence[Share], names: Sequence[Any]) -> list[_Item]:
        """The shares, and how each is to be exchanged: the same on all processes."""
        words = [(type(share).__name__, tuple(share.shape)) for share in shares]
        if not self.meeting.agree_on(Stage.GRAMIAN, words, names):
            raise ParameterError(
                "output",
                "computed by the same operations of the same parameters on all processes",
                f"{len(shares)} shares of operations here that other processes do not have, or "
                "have in another order",
            )
        own = torch.tensor([_costs(share) for share in shares], dtype=torch.int64, device="cpu")
        layouts, factors, rows = own.reshape(-1, 3).unbind(1)
        # The largest of a number and of its negative are opposite only if all processes said the
        # same.
        agreed = torch.stack([layouts, -layouts, factors, rows], 1).to(self.meeting.device)
        items: list[_Item] = []
        loads = [0] * len(self.samples)
        for share, (least, most, in_factors, in_rows) in zip(
            shares, self.meeting.maximum(Stage.COSTS, agreed).tolist(), strict=True
        ):
            # Factors of different shapes, such as sentences of different lengths, stay apart.
            if least == -most and 0 < in_factors <= in_rows:
                # The numbers are the same on all processes, so all of them choose the same one.
                owner = loads.index(min(loads))
                loads[owner] += in_factors
                items.append(_Item(share, owner, in_factors))
            else:
                items.append(_Item(share, None, in_rows))
        return items

    def _exchanged(self, items: Sequence[_Item]) -> Iterator[Share]:
        """The shares of all samples, or some of their columns, that fall to this process."""
        size = len(self.samples)
        nothing = torch.empty(0, dtype=torch.uint8, device=self.meeting.device)
        sent = [  # a process may own no share of those that are sent as factors
            torch.cat([nothing, *(part for item in items for part in item.sent(r, size))])
            for r in range(size)
        ]
        expected = [
            [n for item in items for n in item.sizes(count, self.rank, size)]
            for count in self.samples
        ]
        # The sizes follow from the numbers of samples, which all know: they need no exchange.
        received = sent[0].new_empty(sum(map(sum, expected)))
        joined = torch.cat(sent)
        self.meeting.agree(Stage.FACTORS)
        dist.all_to_all_single(
            received,
            joined,
            [sum(sizes) for sizes in expected],
            [len(part) for part in sent],
            group=self.group,
        )
        parts = torch.split(received, [n for sizes in expected for n in sizes])
        per_process = len(expected[0])
        start = 0
        for item in items:
            count = len(item.sizes(1, self.rank, size))
            found = [
                [parts[r * per_process + k] for r in range(size)]
                for k in range(start, start + count)
            ]
            start += count
            if found:
                yield item.joined(found, self.samples, self.rank, size)


class _Item:
    """
    A share that is exchanged.

    :param share: That of the samples of this process.
    :param owner: The process that is to have the factors of all; None if each gets some columns.
    :param size: Bytes that it takes.
    """

    def __init__(self, share: Share, owner: int | None, size: int) -> None:
        self.share, self.owner, self.size = share, owner, size
        self._rows: Tensor | None = None

    def _tensors(self, process: int, size: int) -> list[tuple[Tensor, int]]:
        """What a process is to get, with the dimension of samples of each."""
        if self.owner is not None:
            return (self.share.factors_of_samples() or []) if process == self.owner else []
        if self._rows is None:
            self._rows = self.share.flat_rows()
        count = self._rows.shape[2]
        columns = slice(count * process // size, count * (process + 1) // size)
        return [(self._rows[..., columns], 1)]

    def sent(self, process: int, size: int) -> list[Tensor]:
        """What a process is to get, in bytes."""
        return [_bytes(tensor) for tensor, _ in self._tensors(process, size)]

    def sizes(self, samples: int, process: int, size: int) -> list[int]:
        """How many bytes of each tensor a process gets from one with so many samples."""
        return [
            math.prod(_with(tensor.shape, dimension, samples)) * tensor.itemsize
            for tensor, dimension in self._tensors(process, size)
        ]

    def joined(
        self, found: list[list[Tensor]], samples: Sequence[int], process: int, size: int
    ) -> Share:
        """
        The share of the samples of all processes.

        :param found: For each tensor, the bytes from each process.
        """
        whole = []
        for (tensor, dimension), parts in zip(self._tensors(process, size), found, strict=True):
            shaped = [
                _tensor(part, tensor, dimension, count)
                for part, count in zip(parts, samples, strict=True)
            ]
            whole.append(torch.cat(shaped, dimension))
        if self.owner is None:
            return Dense(whole[0], whole[0].shape[2:])
        return self.share.of(whole)


def forms_of(factors: Sequence[tuple[Tensor, int]]) -> list[tuple[object, ...]]:
    """What factors of samples must have in common to lie side by side: shapes without samples."""
    return [
        (*tensor.shape[:dimension], *tensor.shape[dimension + 1 :], str(tensor.dtype))
        for tensor, dimension in factors
    ]


def _costs(share: Share) -> tuple[int, int, int]:
    """A number for what its factors must have in common, and the bytes of factors and rows."""
    factors = share.factors_of_samples()
    if factors is None:
        rows = share.flat_rows()
        return 0, 0, rows.numel() * rows.itemsize
    size = sum(tensor.numel() * tensor.itemsize for tensor, _ in factors)
    grads, dimension = factors[1]
    K, B = grads.shape[0], grads.shape[dimension]
    # Rows of half precision are made in float32.
    width = max(4, grads.itemsize)
    return number_of(forms_of(factors), share.setting), size, K * B * share.shape.numel() * width


def _rounds(items: Sequence[_Item]) -> Iterator[list[_Item]]:
    """Some of the shares at a time, in their order."""
    chosen: list[_Item] = []
    filled = 0
    for item in items:
        # The agreed sizes, not those of this process, so that all of them cut at the same places.
        if chosen and filled + item.size > _BYTES:
            yield chosen
            chosen, filled = [], 0
        chosen.append(item)
        filled += item.size
    if chosen:
        yield chosen


def _bytes(tensor: Tensor) -> Tensor:
    # As bytes, since one exchange takes one dtype, and factors may be indices beside gradients.
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _tensor(part: Tensor, like: Tensor, dimension: int, samples: int) -> Tensor:
    """What was sent as bytes: as a tensor, but for the number of samples."""
    shape = _with(like.shape, dimension, samples)
    return part.clone().view(like.dtype).view(shape)  # a copy begins where its dtype may


def _with(shape: Sequence[int], dimension: int, size: int) -> list[int]:
    changed = list(shape)
    changed[dimension] = size
    return changed


def _gathered(count: int, meeting: Meeting, group: Group) -> list[int]:
    own = torch.tensor([count], dtype=torch.int64, device=meeting.device)
    counts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    meeting.agree(Stage.SAMPLES)
    dist.all_gather(counts, own, group=group)
    return [int(each) for each in counts]
