"""What is found out about a class once, for as long as it lives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar
from weakref import finalize, ref

import torch

_R = TypeVar("_R")


class ByClass(dict["ref[Any]", _R]):
    """
    What a function answers for classes: ``answers[ref(cls)]``.

    ``functools.cache`` would keep the classes of notebook cells that ran again. This is asked in
    every step: a dictionary is, without a call of Python, and there is one reference to each class.

    :param find: A function of a class, whose answer does not refer to the class.
    """

    def __init__(self, find: Callable[[Any], _R]) -> None:
        super().__init__()
        self._find = find

    def __missing__(self, key: ref[Any]) -> _R:
        cls = key()
        answer = self._find(cls)
        # What is compiled would depend on how many classes are waited for.
        if not torch.compiler.is_dynamo_compiling():
            self[key] = answer
            finalize(cls, self.pop, key, None).atexit = False
        return answer
