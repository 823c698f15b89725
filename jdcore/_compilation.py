"""Calls that ``torch.compile`` meets in what it traces."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")


def not_traced(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """
    Run a function as it is where ``torch.compile`` traces its caller.

    What reads the autograd graph, or computes in numpy, cannot be traced; torch ends in errors of
    its own there. With this decorator, the region that is compiled is cut in two at the call.
    """

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        # Asked at each call: to make the other form imports the compiler, which takes seconds.
        if torch.compiler.is_dynamo_compiling():
            untraced: Callable[_P, _R] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
            return untraced(*args, **kwargs)
        return function(*args, **kwargs)

    return call
