"""
What torch's graph shows and does not promise to show.

The attributes read here are no public interface of torch: they may be renamed or go in any release.
docs/versions.md lists them, and the few that are read elsewhere. Whoever asks for what an operation
saved gets :class:`Unreadable` where torch does not show it, and finds a way that needs none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import checkpoint

from jdcore._differentiable import plain

T = TypeVar("T")

# How the names of functions written in C++ end, which are templates. No operation of torch is one.
WRITTEN_IN_CPP = ">"


class _Kinds(dict[Any, T]):
    """
    What follows from the class of a node, found out once.

    Nodes of Python functions show what the base of their classes does. These may be made anew in
    each step, and to keep one keeps what its closures hold.
    """

    def __init__(self, find: Callable[[Any], T]) -> None:
        super().__init__()
        self._find = find

    def __missing__(self, kind: Any) -> T:
        if kind.__base__ is not object:
            return self[kind.__base__]
        found = self[kind] = self._find(kind)
        return found


def _once_for_each_kind(find: Callable[[Any], T]) -> Callable[[Any], T]:
    return _Kinds(find).__getitem__


class Unreadable(Exception):  # noqa: N818 - a signal, not an error
    """Torch does not show what an operation saved."""


def saved(node: Any, name: str) -> Any:
    """
    Something that an operation of the graph saved.

    What a checkpoint computed anew for this pass is handed out once and put back, so that the
    operation finds it as well. What other hooks unpack is copied: they may fill the same memory
    again for the next operation.

    :param name: As in the formulas of torch's derivatives, such as "self" or "alpha".
    :raises Unreadable: If torch does not show it.
    """
    try:
        value = getattr(node, f"_saved_{name}")
    except AttributeError:
        raise Unreadable(f"{node.name()} does not show {name!r}") from None
    if not isinstance(value, Tensor):
        return value
    raw: Any = getattr(node, f"_raw_saved_{name}", None)
    if getattr(raw, "unpack_hook", None) is None:
        return plain(value)
    if not isinstance(getattr(raw, "data", None), checkpoint._Holder):
        return plain(value).clone()
    _put_back(raw, value)
    return plain(value)


def all_saved(node: Any) -> dict[str, Any] | None:
    """
    All tensors that an operation saved, by their names, for when a pass has freed them.

    :returns: None if Python code makes some of them, or torch does not show that none does.
    """
    found = {}
    for raw, unpacked, name in _tensor_names(type(node)):
        if getattr(getattr(node, raw), "unpack_hook", node) is not None:
            return None
        value = getattr(node, unpacked)
        found[name] = plain(value) if isinstance(value, Tensor) else value
    return found


def saved_as_it_is(node: Any, name: str) -> Any:
    """
    :func:`saved`, but refusing to run Python code for it.

    Hooks of saved tensors (of checkpoints, of offloading) would make it anew for whoever asks.

    :raises Unreadable: If there are such hooks, if torch does not show it, or if it was freed or
        modified in place, as differentiating will say.
    """
    raw: Any = getattr(node, f"_raw_saved_{name}", None)
    unhooked = hasattr(raw, "unpack_hook") and raw.unpack_hook is None
    if not unhooked:
        raise Unreadable(f"{node.name()} does not show {name!r} as it is")
    try:
        return saved(node, name)
    except RuntimeError as error:
        raise Unreadable(str(error)) from error


def _put_back(raw: Any, value: Tensor) -> None:
    # A checkpoint keeps what it computed anew under a handle for each backward pass, which it drops
    # as soon as the tensor was handed out.
    holder, task = raw.data, current_pass()
    # Outside of a backward pass (a negative number), a checkpoint computes anew for every question.
    if task < 0:
        return
    if holder.handles.get(task) is None:
        kept = [cell.cell_contents for cell in raw.unpack_hook.__closure__]
        [frame] = [frame for frame in kept if isinstance(frame, checkpoint._CheckpointFrame)]
        handle = holder.handles[task] = checkpoint._Handle()
        frame.recomputed[task][handle] = value


def saved_sparse(node: Any) -> bool:
    """Whether an operation saved a sparse tensor, as products with sparse matrices do."""
    names = [name.removeprefix("_raw_saved_") for name in _raw_names(type(node))]
    values = [saved(node, name) for name in names]
    return any(isinstance(v, Tensor) and v.layout != torch.strided for v in values)


def has_unpack_hooks(node: Any) -> bool:
    """Whether Python code gives an operation what it saved, as checkpoints do."""
    for name in _raw_names(type(node)):
        raw = getattr(node, name)
        for one in raw if isinstance(raw, (tuple, list)) else (raw,):
            if getattr(one, "unpack_hook", None) is not None:
                return True
    return False


@_once_for_each_kind
def _tensor_names(kind: Any) -> list[tuple[str, str, str]]:
    """Of each saved tensor the attributes that have it packed and unpacked, and its name."""
    names = [raw.removeprefix("_raw_saved_") for raw in _raw_names(kind)]
    return [(f"_raw_saved_{name}", f"_saved_{name}", name) for name in names]


@_once_for_each_kind
def _raw_names(kind: Any) -> tuple[str, ...]:
    return tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))


def results_of(node: Any) -> tuple[tuple[Any, ...], ...]:
    """The results of an operation: the sizes of each, and its dtype behind them."""
    # Plain tuples, since this is asked of each operation in each step; most have one result.
    found = node._input_metadata
    try:
        if len(found) == 1:
            [result] = found
            return ((*result.shape, result.dtype),)
        return tuple([(*result.shape, result.dtype) for result in found])
    except RuntimeError:  # of nested tensors that are not jagged, which have no sizes
        return tuple([(*_sizes(result), result.dtype) for result in found])


def _sizes(result: Any) -> tuple[Any, ...]:
    try:
        return tuple(result.shape)
    except RuntimeError:
        return ()


def sizes_of(node: Any) -> str:
    """
    The name of an operation, and its sizes: of its results, of its operands and of what it saved.

    All numbers of entries above one count as the same. A rule that is right for some of them is so
    for others, but may treat dimensions of one entry, or of none, otherwise, and numbers.
    """
    sizes = [of_result[:-1] for of_result in results_of(node)]
    for child, number in node.next_functions:
        if getattr(child, "_input_metadata", None):
            sizes.append(results_of(child)[number][:-1])
    for name in _raw_names(type(node)):
        with suppress(Unreadable):
            value = saved_as_it_is(node, name.removeprefix("_raw_saved_"))
            if isinstance(value, Tensor) and not value.is_nested:
                sizes.append(tuple(value.shape))
    # The sizes of jagged tensors are no integers, and cannot be compared with any.
    told = [tuple([n if n in (0, 1) else 2 for n in of_one]) for of_one in sizes]
    return f"{node.name()} {told}"


def device_of(node: Any, number: int) -> torch.device:
    """Where a result of an operation is."""
    found: torch.device = node._input_metadata[number].device
    return found


def zeros_at(node: Any, number: int) -> Tensor:
    """A gradient of zero at a result of an operation."""
    result = node._input_metadata[number]
    return torch.zeros(tuple(result.shape), dtype=result.dtype, device=result.device)


def plain_attributes(nodes: Iterable[Any]) -> tuple[tuple[Any, ...], ...]:
    """
    The integers that operations saved: dimensions, offsets, shifts, whether it is in training.

    Two operations with the same name, shapes and integers move entries in the same way, unless they
    move them by an index tensor.
    """
    # In few calls of Python, as each step reads all nodes.
    given = list(nodes)
    readers = {kind: _plain_reader(kind) for kind in set(map(type, given))}
    return tuple(
        [
            ()
            if read is None
            else values
            if _PLAIN.issuperset(map(type, values := read(node)))
            else _without_floats(names, values)
            for node in given
            for names, read in (readers[type(node)],)
        ]
    )


def _without_floats(names: Iterable[str], values: Iterable[Any]) -> tuple[Any, ...]:
    # Floats (a slope, a threshold, an epsilon) scale entries or choose among them, and move none,
    # but for the scales of an interpolation.
    return tuple(
        [
            value
            for name, value in zip(names, values, strict=True)
            if value is None
            or isinstance(value, (int, str, tuple))
            or name.startswith("_saved_scales")
        ]
    )


_PLAIN = frozenset({int, bool, str, tuple, type(None)})


@_once_for_each_kind
def _plain_reader(kind: Any) -> tuple[tuple[str, ...], Callable[[Any], tuple[Any, ...]] | None]:
    """Names of attributes, and what reads them all by one call; None if there are none."""
    names = [name for name in dir(kind) if name.startswith("_saved_")]
    raw = {name.removeprefix("_raw") for name in _raw_names(kind)}
    # Tensors have a raw form, too, and are left out, as are the sizes of operands
    # (`_saved_self_sym_sizes`): shapes are compared by themselves.
    plain = tuple(n for n in names if n not in raw and "_sym_" not in n)
    if len(plain) == 1:
        plain *= 2  # of one name alone, the value would come without a tuple
    return plain, attrgetter(*plain) if plain else None


def function_of(node: Any) -> type | None:
    """
    The ``torch.autograd.Function`` behind a node, None for an operation of torch.

    Of functions written in C++ the graph shows the name alone: a class of this name stands for one.
    """
    cls: type | None = getattr(node, "_forward_cls", None)
    if cls is None and type(node).__name__ == "CppFunction":  # as torch shows what it does not know
        return _written_in_cpp(node.name())
    return cls


@cache
def _written_in_cpp(name: str) -> type | None:
    # What torch shows in the same way besides them is of its own: operations on lists of tensors,
    # and what TorchScript makes of operations.
    return type(name, (), {"__module__": ""}) if name.endswith(WRITTEN_IN_CPP) else None


def function_of_others(node: Any) -> type | None:
    """
    :func:`function_of`, but None for torch's own, such as those of compiled regions.

    The backward of these is trusted, but for captured graphs, which return the same memory each
    time, and for those that run what users gave them.
    """
    function = function_of(node)
    if function is None or function.__module__ in _RUNNING_OTHERS:
        return function
    return None if function.__module__.startswith("torch.") else function


_RUNNING_OTHERS = {
    "torch.cuda.graphs",
    "torch._library.autograd",  # operations that users register
    "torch._functorch.autograd_function",  # their functions inside of vmap or compiled regions
}


def current_pass() -> int:
    """A number of the backward pass that runs in this thread, negative if there is none."""
    # Torch's own `register_multi_grad_hook` and checkpoints rely on it.
    number: int = torch._C._current_graph_task_id()
    return number


def is_batched(tensor: Tensor | None) -> bool:
    """Whether ``torch.vmap`` hides a dimension of a tensor."""
    return tensor is not None and torch._C._functorch.is_batchedtensor(tensor)


def some_computed_before(nodes: Iterable[Any], number: int) -> bool:
    """
    Whether one of some operations was computed when :func:`next_computed_at` was a number.

    Or by another thread, each of which counts by itself, as far as that shows.
    """
    # It grows from one operation to the next, in the order of the forward pass.
    numbers = [node._sequence_nr() for node in nodes]
    return bool(numbers) and (min(numbers) < number or max(numbers) >= next_computed_at())


def next_computed_at() -> int:
    """The number that the next operation of this thread will have."""
    number: int = torch._C._autograd._get_sequence_nr()
    return number
