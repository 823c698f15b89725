from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from enum import IntEnum
from types import TracebackType
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from attrs import define, field
from torch import Tensor

from jdcore.errors import PeerError

Group: TypeAlias = "dist.ProcessGroup"

# What processes say to one another has this many numbers, whatever they have to say: processes that
# have come to different places of a step then notice it instead of hanging.
_NUMBERS = 12
_TEXT = 400
_UNKNOWN = -(1 << 40)


# Whether this process has met others since the error handler was set up: then the meeting itself
# tells them.
_MET: ContextVar[bool] = ContextVar("met", default=False)


@contextmanager
def telling(meeting: Callable[[], Meeting | None]) -> Iterator[None]:
    """
    Tell others of an error in a ``with`` block that happens before the first meeting in it.

    :param meeting: Finds with whom this process is to meet, None if with nobody. Only called after
        an error.
    """
    token = _MET.set(False)
    try:
        yield
    except Exception as error:
        others = None if _MET.get() else meeting()
        if others is not None:
            others.tell(error)
        raise
    finally:
        _MET.reset(token)


class Stage(IntEnum):
    """Places of a step at which processes meet."""

    FAILED = 0
    START = 1
    PRESENCE = 2
    GRAMIAN = 3
    WEIGHTS = 4
    FINITE = 5
    ROWS = 6
    UPDATE = 7
    INNER = 8
    PASSES = 9
    SAMPLES = 10
    LOSSES = 11
    LARGEST = 12
    COSTS = 13
    FACTORS = 14
    GATHER = 15
    COPIES = 16
    END = 17


@define(eq=False)
class Meeting:
    """
    A step that several processes make together, as a context.

    Right before every exchange, when all that it takes is there, the processes agree
    (:meth:`agree`) that all have come as far. An error on one of them, wherever it happens, is
    therefore told at the next exchange of the others, or at the end of the block, and raised on
    all: on the process itself as it is, on the others as :class:`~jdcore.errors.PeerError`. What is
    written after the block is written on all processes or none.

    :param groups: The process groups in which this process is, one for each dimension of the grid
        of processes: what is reduced over each of them in turn is reduced over all processes.
    :param device: Where to put the numbers that are exchanged.
    """

    groups: Sequence[Group]
    device: torch.device
    _told: bool = field(default=False, init=False)

    def __enter__(self) -> Meeting:
        _MET.set(True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            try:
                self.agree(Stage.END)
            except Exception as late:
                self.tell(late)
                raise
        # Not KeyboardInterrupt and the like: to wait for others then would keep the user waiting.
        elif isinstance(error, Exception):
            self.tell(error)

    def tell(self, error: Exception) -> None:
        """Tell the other processes of an error on this one, if they do not know."""
        if not self._told:
            self._agree(Stage.FAILED, (), error)

    @property
    def size(self) -> int:
        """Number of processes."""
        size = 1
        for group in self.groups:
            size *= dist.get_world_size(group)
        return size

    def agree(self, stage: Stage, *values: int | None) -> list[int | None]:
        """
        Meet the other processes.

        :param stage: Where this process is.
        :param values: Numbers to be compared; None where this process has nothing to say.
        :returns: The largest of each; None where no process has anything to say.
        :raises PeerError: If another process failed, or is somewhere else.
        """
        return self._agree(stage, values, None)

    def _agree(
        self, stage: Stage, values: Sequence[int | None], error: Exception | None
    ) -> list[int | None]:
        # Zero stands for no error; where several processes fail, the last of them is heard.
        failed = 0 if error is None else dist.get_rank() + 1
        said = [_UNKNOWN if value is None else value for value in values]
        # All are at the same stage if the largest stage is the opposite of the largest negative
        # one.
        numbers = [failed, int(stage), -int(stage), *said]
        heard = self._reduced(_padded(numbers, self.device), dist.ReduceOp.MAX).tolist()
        if heard[0] or (error is None and heard[1] != -heard[2]):
            self._told = True
            self._raise(heard[0] - 1, error)
        return [None if v == _UNKNOWN else int(v) for v in heard[3 : 3 + len(values)]]

    def _raise(self, culprit: int, error: Exception | None) -> None:
        if culprit < 0:
            raise PeerError(
                None, "the processes do not call the same functions with the same kind of method"
            )
        # The text goes in a second exchange, of which the first one told everybody: the usual one
        # stays small.
        own = culprit == dist.get_rank()
        reason = f"{type(error).__name__}: {error}".encode()[:_TEXT] if own else b""
        # Zeros everywhere but on the process that failed, so that the largest of all are its
        # letters.
        letters = torch.zeros(_TEXT, dtype=torch.int64, device="cpu")
        letters[: len(reason)] = torch.tensor(list(reason), dtype=torch.int64, device="cpu")
        heard = self._reduced(letters.to(self.device), dist.ReduceOp.MAX).tolist()
        if error is None:
            text = bytes(letter for letter in heard if letter).decode(errors="replace")
            raise PeerError(culprit, text)

    def agree_on(self, stage: Stage, *things: object) -> bool:
        """Meet the other processes, and tell whether all have the same things."""
        return self.agree_on_each(stage, things)[0]

    def agree_on_each(self, stage: Stage, *things: object) -> list[bool]:
        """:meth:`agree_on`, for each of some things."""
        own = [number_of(thing) for thing in things]
        heard = self.agree(stage, *own, *[-number for number in own])
        pairs = zip(heard[: len(own)], heard[len(own) :], strict=True)
        return [is_same(most, least) for most, least in pairs]

    def maximum(self, stage: Stage, values: Tensor) -> Tensor:
        """Meet, and find the largest of each value over all; the argument is overwritten."""
        self.agree(stage)
        return self._reduced(values, dist.ReduceOp.MAX)

    def total(self, stage: Stage, values: Tensor) -> Tensor:
        """Meet, and add up each value over all processes; the argument is overwritten."""
        self.agree(stage)
        return self._reduced(values, dist.ReduceOp.SUM)

    def from_first(self, stage: Stage, values: Tensor) -> Tensor:
        """Meet, and take the values of the first process; the argument is overwritten."""
        self.agree(stage)
        for group in self.groups:
            dist.broadcast(values, src=dist.get_global_rank(group, 0), group=group)
        return values

    def _reduced(self, values: Tensor, operation: Any) -> Tensor:
        # Over one dimension of the grid after the other: there need not be a group of all.
        for group in self.groups:
            dist.all_reduce(values, op=operation, group=group)
        return values


def number_of(*things: object) -> int:
    """A number that tells things apart, to be compared between processes."""
    # Not hash(), by which each process has numbers of its own for texts.
    return zlib.crc32(repr(things).encode())


def is_same(most: int | None, least: int | None) -> bool:
    """
    Whether all processes said the same number.

    :param most: The largest of the numbers, as :meth:`Meeting.agree` returns it.
    :param least: The largest of their negatives.
    """
    return most is not None and least is not None and most == -least


def _padded(numbers: list[int], device: torch.device) -> Tensor:
    padded = numbers + [_UNKNOWN] * (_NUMBERS - len(numbers))
    return torch.tensor(padded, dtype=torch.int64, device=device)
