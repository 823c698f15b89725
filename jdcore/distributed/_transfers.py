from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from jdcore.distributed._meeting import Group, Meeting, Stage

# Torch 2.13 gave these other names, and warns of the ones before.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

# As much as DistributedDataParallel sends at once.
_BYTES = 25 << 20
# Buckets on their way at a time: one is sent while the next one is filled.
_UNDERWAY = 2


class Bucket:
    """
    Tensors of one dtype and device, whose columns are divided among processes together.

    :param tensors: The tensors.
    :param group: The R processes; all must make the same buckets.
    """

    def __init__(self, tensors: Sequence[Tensor], group: Group) -> None:
        self.tensors = tensors
        self.group = group
        self.world = dist.get_world_size(group)
        self.sizes = [tensor.numel() for tensor in tensors]
        # Collectives take parts of one size.
        self.width = max(1, -(-sum(self.sizes) // self.world))
        """Number of columns of each process; the last ones are filled up with zeros."""

    def rows(self, matrices: Sequence[Tensor | None], m: int) -> Tensor:
        """
        The columns of all processes: [m, R * width].

        :param matrices: One matrix [m, n] for each tensor; None stands for zeros.
        """
        # Zeros, for what fills up and for tensors that this process has no rows of.
        rows = self.tensors[0].new_zeros(m, self.world * self.width)
        for columns, matrix in zip(self._pieces(rows), matrices, strict=True):
            if matrix is not None:
                columns.copy_(matrix)
        return rows

    def packed(self, matrices: Sequence[Tensor | None], m: int) -> Tensor:
        """:meth:`rows` as what each process is to get: [R, m, width]."""
        rows = self.rows(matrices, m)
        return rows.view(m, self.world, self.width).transpose(0, 1).contiguous()

    def split(self, whole: Tensor) -> list[Tensor]:
        """The columns of each tensor among those of all, in memory of their own."""
        return [piece.clone() for piece in self._pieces(whole)]

    def _pieces(self, whole: Tensor) -> Sequence[Tensor]:
        return torch.split(whole[..., : sum(self.sizes)], self.sizes, dim=-1)


def buckets_of(tensors: Iterable[Tensor], rows: int, group: Group) -> list[Bucket]:
    """
    Divide tensors into buckets, in their order.

    :param rows: How many rows of each are sent.
    """
    parts: list[list[Tensor]] = []
    filled = 0
    for tensor in tensors:
        size = rows * tensor.numel() * tensor.itemsize
        if not parts or filled + size > _BYTES or not _alike(parts[-1][-1], tensor):
            parts.append([])
            filled = 0
        parts[-1].append(tensor)
        filled += size
    return [Bucket(part, group) for part in parts]


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device


Item = TypeVar("Item")


def by_bucket(
    buckets: Sequence[Bucket], items: Sequence[Item]
) -> Iterator[tuple[Bucket, Sequence[Item]]]:
    """Each bucket with those of the items, one for each tensor, that belong to it."""
    start = 0
    for bucket in buckets:
        end = start + len(bucket.tensors)
        yield bucket, items[start:end]
        start = end


def gathered(meeting: Meeting, buckets: Sequence[Bucket], parts: Sequence[Tensor]) -> list[Tensor]:
    """
    One vector for each tensor of some buckets, from what all processes have of it.

    :param meeting: The processes.
    :param parts: For each bucket the part of this process, [width].
    """
    sent = [
        part.to(bucket.tensors[0].dtype).contiguous()
        for bucket, part in zip(buckets, parts, strict=True)
    ]
    received = [
        part.new_empty(bucket.world * bucket.width)
        for bucket, part in zip(buckets, sent, strict=True)
    ]
    # Memory for everything is there before: an error in the middle of an exchange could not be
    # told.
    meeting.agree(Stage.UPDATE)
    for bucket, whole, part in zip(buckets, received, sent, strict=True):
        _all_gather(whole, part, group=bucket.group)
    pairs = zip(buckets, received, strict=True)
    return [vector for bucket, whole in pairs for vector in bucket.split(whole)]


def mean_shards(
    meeting: Meeting, buckets: Sequence[Bucket], matrices: Sequence[Tensor | None], m: int
) -> list[Tensor]:
    """
    The mean over processes of rows, of which each process gets its columns.

    :param meeting: The processes.
    :param matrices: One matrix [m, n] for each tensor of the buckets; None stands for zeros.
    :returns: For each bucket a matrix [m, width], in float32 or float64.
    """
    packed = (
        (bucket.packed(rows, m), bucket.group) for bucket, rows in by_bucket(buckets, matrices)
    )
    return list(scattered(meeting, packed))


def scattered(meeting: Meeting, packed: Iterable[tuple[Tensor, Group]]) -> Iterator[Tensor]:
    """
    Means over processes, of which each process gets its part.

    :param meeting: The processes.
    :param packed: What the R processes of a group are to get, [R, m, width], with the group.
    :returns: For each the mean of what this process is to get, [m, width], in float32 or float64.
    """
    underway: list[_Scatter] = []
    for sent, group in packed:
        # Its memory comes before the agreement: to run out of it afterwards would leave the others
        # waiting.
        scatter = _Scatter(sent, group)
        meeting.agree(Stage.ROWS)
        scatter.start()
        underway.append(scatter)
        if len(underway) > _UNDERWAY:
            yield underway.pop(0).result()
    for scatter in underway:
        yield scatter.result()


def mean_rows(
    meeting: Meeting, buckets: Sequence[Bucket], matrices: Sequence[Tensor | None], m: int
) -> list[Tensor]:
    """
    The mean over processes of rows, whole on each of them.

    :param meeting: The processes.
    :param matrices: As for :func:`mean_shards`.
    :returns: One matrix [m, n] for each tensor, in its dtype.
    """
    results: list[Tensor] = []
    for bucket, rows in by_bucket(buckets, matrices):
        whole = bucket.rows(rows, m)
        wide = whole.to(torch.promote_types(whole.dtype, torch.float32)).div_(bucket.world)
        meeting.agree(Stage.ROWS)
        dist.all_reduce(wide, group=bucket.group)
        results += bucket.split(wide.to(whole.dtype))
    return results


class _Scatter:
    """
    A reduction that runs from its start until its result is asked for.

    :param sent: What each process is to get, [R, m, width].
    """

    def __init__(self, sent: Tensor, group: Group) -> None:
        self.world, m, width = sent.shape
        self.sent, self.group = sent, group
        # gloo sends as much for a reduce-scatter as for an all-reduce, which is twice too much.
        self.exchanged = dist.get_backend(group) == "gloo"
        self.received = torch.empty_like(sent) if self.exchanged else sent.new_empty(m, width)

    def start(self) -> None:
        if self.exchanged:
            self.work = dist.all_to_all_single(
                self.received, self.sent, group=self.group, async_op=True
            )
        else:
            sent = self.sent.view(-1, self.sent.shape[2])
            self.work = _reduce_scatter(self.received, sent, group=self.group, async_op=True)

    def result(self) -> Tensor:
        self.work.wait()
        # Half precision would lose digits with every process that is added.
        wide = torch.promote_types(self.received.dtype, torch.float32)
        total = self.received.sum(0, dtype=wide) if self.exchanged else self.received.to(wide)
        return total.div_(self.world)
