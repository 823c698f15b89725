"""What is found out about a class once, for as long as it lives."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar
from weakref import finalize

_R = TypeVar("_R")


def by_class(find: Callable[[Any], _R]) -> Callable[[Any], _R]:
    """
    Like ``functools.cache``, which would keep the classes of notebook cells that ran again.

    :param find: A function of one class, whose answer does not refer to the class.
    """
    # By number, as looking a class up by itself in a WeakKeyDictionary takes twice as long: it is
    # done in every step. The number is free for other classes once the finalizer has run.
    found: dict[int, _R] = {}

    @wraps(find)
    def known(cls: Any) -> _R:
        try:
            return found[id(cls)]
        except KeyError:
            answer = found[id(cls)] = find(cls)
            finalize(cls, found.pop, id(cls), None).atexit = False
            return answer

    return known
