"""
Tensors whose ``.grad`` every backward pass writes, since somebody called ``retain_grad`` on them.

A graph does not lead from an operation to the tensors that it computed, torch keeps no list of
those that retain their gradient, and the call leaves no trace in Python but on the tensor itself:
no attribute of the node, no entry of its metadata and no handle, which would be counted like those
of hooks, tells of it (torch 2.11 to 2.15). To look for such tensors among all objects at each step
would take tens of milliseconds. So the call itself is noted, from the first time on that somebody
asks. Those of before are found by one look at all tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from jdcore._living import living
from jdcore.graph._walk import Reach


@cache
def _noted() -> WeakTensorKeyDictionary:
    """The tensors that ``retain_grad`` was called on."""
    noted = WeakTensorKeyDictionary()
    _note_calls(noted)
    noted.update({found: True for found in living(Tensor) if found.retains_grad})
    return noted


def retaining() -> list[Tensor]:
    """All living tensors that retain their gradient, leaves aside."""
    noted = _noted()
    return [tensor for tensor in list(noted) if tensor.retains_grad] if noted else []


def _note_calls(noted: WeakTensorKeyDictionary) -> None:
    retain_grad: Any = Tensor.retain_grad

    @wraps(retain_grad)
    def note(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        result = retain_grad(tensor, *args, **kwargs)
        if isinstance(tensor, Tensor) and not tensor.is_leaf:
            noted[tensor] = True
        return result

    Tensor.retain_grad = note  # type: ignore[method-assign, assignment]


def retained_in(graph: Reach, but: Iterable[Tensor] = ()) -> list[Tensor]:
    """The tensors inside of a graph that retain their gradient, apart from some."""
    found = retaining()
    return [t for t in found if graph.reaches(t) and all(t is not other for other in but)]


@contextmanager
def put_back_on_failure(*graphs: Reach) -> Iterator[None]:
    """Put back the ``.grad`` of all tensors that retain it where a ``with`` block raises."""
    before = [(tensor, tensor.grad) for graph in graphs for tensor in retained_in(graph)]
    try:
        yield
    except BaseException:
        for tensor, gradient in before:
            tensor.grad = gradient
        raise
