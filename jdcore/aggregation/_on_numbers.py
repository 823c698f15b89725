from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from jdcore._compilation import not_traced
from jdcore._modes import innermost_transform, is_inside_of, is_wrapped, without_transforms
from jdcore.aggregation._nested_state import state_kept
from jdcore.errors import JDCoreError, ParameterError

_P = ParamSpec("_P")
_R = TypeVar("_R")


def on_numbers(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """
    A method of an aggregator or weighting that is right where torch traces or transforms the code.

    It is :func:`not_traced`. Transforms of ``torch.func`` do not see what numpy computes: under
    ``functionalize``, numpy would read memory that nobody wrote. Tensors from outside of a
    transform are constants for it, so that the call runs outside, once for all samples of a vmap.
    """

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if torch.compiler.is_dynamo_compiling():
            return not_traced(function)(*args, **kwargs)
        if innermost_transform() is None:
            return function(*args, **kwargs)
        given = inspect.signature(function).bind(*args, **kwargs).arguments
        transformed = [name for name, tensor in _tensors(given) if is_wrapped(tensor)]
        if not transformed:
            with without_transforms():
                return function(*args, **kwargs)
        if is_inside_of("Vmap", "Functionalize"):
            raise _no_numbers(transformed[0])
        try:
            with state_kept(args[0]):
                return function(*args, **kwargs)
        except RuntimeError as error:
            if isinstance(error, JDCoreError):
                raise
            raise _no_numbers(transformed[0]) from error

    return call


def _tensors(given: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in given.items():
        several = value if isinstance(value, (list, tuple)) else [value]
        yield from ((name, part) for part in several if isinstance(part, Tensor))


def _no_numbers(parameter: str) -> ParameterError:
    return ParameterError(
        parameter,
        "made of numbers, for methods that look at them",
        "a Tensor inside of a transform of torch.func (vmap, functionalize, grad, ...)",
        "Call the method outside of it.",
    )
