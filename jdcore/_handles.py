"""The count of hooks, of all kinds and anywhere, but for those that jdcore itself has in a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from attrs import define, field
from torch.utils.hooks import RemovableHandle

Hooks: TypeAlias = "dict[int, Callable[..., Any]]"
"""Hooks of one kind in the order of their calls, by the numbers of their handles."""


@define
class _Own:
    count: int = 0
    present: set[int] = field(factory=set)


_OWN = _Own()


def hooks_made() -> int:
    """How many hooks of any kind were made so far in this process, without ours."""
    return RemovableHandle.next_id - _OWN.count


def is_own(number: int) -> bool:
    """Whether a hook is ours, of a pass in any thread, by the number of its handle."""
    return number in _OWN.present


@contextmanager
def own_hooks(made: Iterable[RemovableHandle]) -> Iterator[None]:
    """
    Have hooks of ours for the time of a ``with`` block, which do not count.

    :param made: Makes them, one whenever the next one is asked for.
    """
    handles = list(made)
    numbers = [handle.id for handle in handles]
    # Not what the count grew by: another thread may make some, too.
    _OWN.count += len(handles)
    _OWN.present.update(numbers)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        _OWN.present.difference_update(numbers)


def hooks_of(node: Any) -> tuple[Hooks, Hooks]:
    """The hooks that run before and after an operation, in the dictionaries that torch calls."""
    made: list[RemovableHandle] = []

    def probes() -> Iterator[RemovableHandle]:
        for register in (node.register_prehook, node.register_hook):
            made.append(register(_hand_on))
            yield made[-1]

    # Torch does not show its hooks, but keeps all of one kind in one dictionary, which the handle
    # of one more of them knows.
    with own_hooks(probes()):
        before, after = (handle.hooks_dict_ref() or {} for handle in made)
    return before, after


def _hand_on(*gradients: object) -> None:
    del gradients
