"""Several rows at once, by vmap: how many, what if it fails, and what it may leave behind."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from attrs import frozen
from torch import Tensor

from jdcore._differentiable import dispatches
from jdcore._living import living
from jdcore.errors import JDCoreError, VectorizationError, VectorizationWarning, warn
from jdcore.graph import Reach
from jdcore.graph._batched import is_known_to_be_left, note_left, some_are_batched_now
from jdcore.graph._hooks import hooks_anywhere, hooks_made_lately
from jdcore.graph._memory import free_memory
from jdcore.graph._operations import EMBEDDING, is_listed, is_sparse, some_batched_wrongly
from jdcore.graph._saved import is_batched, sizes_of
from jdcore.graph._walk import largest_gradient

Result = TypeVar("Result")

# On CPUs: enough rows to make the calls cheap, few enough to bound the m-fold gradients of
# activations. Also where a device does not tell how much memory it has.
_MOST_ROWS = 64
# Two rows take as long one by one, or less: vmap needs twice as many calls for each operation.
_FEWEST_ROWS = 3
# Mean number of parameters per operator up to which the calls cost more than the arithmetic.
_SMALL = 4096
# How many gradients as large as the largest are alive at once in a backward pass: up to six, in
# that of a batch normalization.
_ALIVE = 6


@frozen
class Kind:
    """
    What vmap can know of a graph before it is tried.

    :param operations: Names of the operations in it, those that are not known to be batched rightly
        together with their sizes, see :func:`sizes_of`.
    :param custom: Whether Python code runs in the backward pass: custom functions, checkpoints,
        compiled regions. They may not expect batched tensors.
    :param wrong: Whether torch gives wrong rows for one of its operations, without a word.
    """

    operations: frozenset[str]
    custom: bool
    wrong: bool

    @staticmethod
    def of(graph: Reach) -> Kind:
        """The kind of the graph that was walked."""
        nodes = graph.nodes
        operations = set(nodes.values())
        unknown = {name for name in operations if not is_listed(name)}
        if unknown:
            operations |= {sizes_of(node) for node, name in nodes.items() if name in unknown}
        # What failed for sparse gradients works for dense ones of the same operation.
        if EMBEDDING in operations and any(is_sparse(name, node) for node, name in nodes.items()):
            operations.add("sparse")
        wrong = some_batched_wrongly(nodes)
        return Kind(frozenset(operations), bool(graph.functions), wrong)

    @property
    def convolves(self) -> bool:
        """Whether there are convolutions in it."""
        return any("Conv" in name for name in self.operations)

    @property
    def proven(self) -> bool:
        """Whether all of its operations are known to be batched rightly."""
        return self.operations in _WORKED or self.listed

    @property
    def listed(self) -> bool:
        """Whether that is so because all of them are named as such."""
        return all(map(is_listed, self.operations))

    @property
    def failed(self) -> bool:
        """Whether vmap has failed on such a graph before."""
        return self.operations in _FAILED


def choose_chunk_size(
    kind: Kind,
    inputs: Sequence[Tensor],
    m: int,
    use_all: Callable[[], bool],
    graph: Reach,
    *,
    known: bool = False,
) -> int:
    """
    How many rows to differentiate at once if the user leaves it open; 1 means without vmap.

    On accelerators: all of them, as far as memory permits, but for two, which take fewer calls one
    by one. Nothing is read from the device for it.

    With one CPU thread, torch 2.13, vmap makes a vector of 32 losses of a 64-wide perceptron 3
    times faster than single rows and that of a GRU 1.7 times, where the time of a row is spent on
    calling operators rather than in them. Perceptrons from width 256 on are 0.8 to 1.4,
    transformers 0.5 to 0.9 and convolutions (whose weight gradients become grouped convolutions)
    0.6 to 0.9 times as fast. With separate losses each vmapped row passes through the heads of all
    the others too, which a single row does not; see ``tests/benchmarks/autojac.py``.

    :param kind: The graph to be differentiated.
    :param inputs: The tensors with respect to which it is.
    :param m: Number of rows.
    :param use_all: Tells whether each row differentiates all outputs.
    :param graph: What lies behind the outputs.
    :param known: Whether ``use_all`` tells without reading values.
    """
    if kind.wrong:
        return 1
    # A hook would be called with a batched tensor, which its author need not expect.
    if kind.custom or kind.failed or any(tensor._backward_hooks for tensor in inputs):
        return 1
    if any(map(dispatches, inputs)):  # a wrapper knows of no batched tensors
        return 1
    on_cpu = any(tensor.is_cpu for tensor in inputs)
    if m < _FEWEST_ROWS and (on_cpu or known):
        return 1
    if on_cpu:
        small = is_small(graph, inputs)
        # An output that a row does not use may have an infinite derivative, which gives NaN under
        # vmap. Rows that use all outputs have it themselves, as on accelerators the Jacobian does.
        suits = small and not kind.convolves and use_all()
        return min(m, _MOST_ROWS) if suits else 1
    return _rows_that_fit(m, inputs, graph)


def is_small(graph: Reach, inputs: Iterable[Tensor]) -> bool:
    """Whether the calls of a backward pass on a CPU cost more than the arithmetic."""
    return sum(tensor.numel() for tensor in inputs) <= _SMALL * len(graph.nodes)


def _rows_that_fit(m: int, inputs: Sequence[Tensor], graph: Reach) -> int:
    jacobian = m * sum(tensor.numel() * tensor.itemsize for tensor in inputs)
    row = bytes_of_row(inputs, graph)
    available = free_memory(inputs[0].device, enough=jacobian + m * row)
    if available is None:
        return min(m, _MOST_ROWS)
    return max(1, min(m, (available - jacobian) // row))


def bytes_of_row(inputs: Sequence[Tensor], graph: Reach) -> int:
    """What each of several rows takes during a pass, beside its part of the Jacobian."""
    # Rows of a convolution or a table come out in another order, and are copied.
    copied = max(tensor.numel() * tensor.itemsize for tensor in inputs)
    return _ALIVE * max(1, largest_gradient(graph)) + copied


# Operations of graphs for which vmap has worked in this process, and how often, or has failed.
_WORKED: dict[frozenset[str], int] = {}
_FAILED: set[frozenset[str]] = set()
# How often such graphs were in doubt, as hooks had been made since, and whether there were any.
_DOUBTED: dict[frozenset[str], int] = {}
_HOOKED: dict[frozenset[str], bool] = {}
# After how many calls to look for what vmap may have left behind, and in how many doubts for hooks.
_LOOKS = frozenset(16**k for k in range(16))
_FIRST_DOUBTS = 8

_WRONG = "torch batches the derivative of an operation wrongly."


def seems_hooked(kind: Kind, graph: Reach) -> bool:
    """
    Whether hooks on tensors of a graph would be called with batched gradients.

    torch does not show such hooks. Where hooks were made lately, be it anywhere, a look at all
    objects tells, which takes tens of milliseconds. Libraries may make hooks in every step: then it
    is taken at the first eight of these calls, at the 16th, the 256th, and so on, and holds until
    the next one.
    """
    if not hooks_made_lately(graph.nodes):
        return False
    calls = _DOUBTED[kind.operations] = _DOUBTED.get(kind.operations, 0) + 1
    if calls <= _FIRST_DOUBTS or calls in _LOOKS:
        _HOOKED[kind.operations] = hooks_anywhere(graph.leaves)
    return _HOOKED[kind.operations]


def attempt(
    kind: Kind,
    solve: Callable[[bool], Result],
    retain_graph: bool,
    one_by_one: Callable[[], Result],
    is_right: Callable[[Result, bool], bool],
) -> Result:
    """
    Solve with vmap if it works; else one by one, with one warning for each kind of graph.

    :param solve: Differentiates with vmap; its argument says whether to retain the graph.
    :param one_by_one: Differentiates without.
    :param is_right: Whether what vmap made is that of single passes, told by one more pass; its
        second argument says whether to retain the graph.
    :raises VectorizationError: If vmap worked on graphs of this kind before and fails now, where
        the graph is freed. The next such graph is differentiated one by one.
    """
    known = kind.operations in _WORKED
    try:
        # Once it is known to work, what the pass goes through may be freed, and no way leads back.
        results = solve(retain_graph if known else True)
    except torch.OutOfMemoryError:
        raise  # which says nothing of vmap
    except Exception as error:
        # Any exception: what a broken batching rule raises is not specified.
        blamed = _blames_vmap(error) or not kind.listed
        if known and not (retain_graph or blamed):
            raise
        reason = describe_failure(error)
        if known and not retain_graph:
            _give_up(kind)
            raise VectorizationError(
                f"{reason} It worked for earlier graphs of the same operations, so a hook may read "
                "or keep values here, or a factor be sparse. From now on, rows of such graphs are "
                "differentiated one by one."
            ) from error
    else:
        if kind.proven or is_right(results, True):
            return _examined(kind, results, None if known else one_by_one)
        reason = _WRONG
    results = one_by_one()  # raises the same again if vmap is not to blame
    _give_up(kind)
    warn(VectorizationWarning(reason))
    return results


def _examined(kind: Kind, results: Result, otherwise: Callable[[], Result] | None) -> Result:
    """
    The results of vmap, if it left nothing behind; looked at after 1, 16, 256, ... calls.

    :param otherwise: How to get results without vmap, if the graph is still there.
    """
    calls = _WORKED.get(kind.operations, 0) + 1
    looks = calls in _LOOKS
    # What another thread is batching looks the same as what is left behind. Such a call does not
    # count, so that the next one looks.
    if looks and some_are_batched_now():
        return results
    _WORKED[kind.operations] = calls
    if not looks:
        return results
    try:
        _check_nothing_escaped()
    except _EscapeError as error:
        _give_up(kind)
        warn(VectorizationWarning(describe_failure(error)))
        return results if otherwise is None else otherwise()
    return results


def _give_up(kind: Kind) -> None:
    _WORKED.pop(kind.operations, None)
    _FAILED.add(kind.operations)


def insist(
    kind: Kind,
    solve: Callable[[bool], Result],
    retain_graph: bool,
    one_by_one: Callable[[], Result],
    is_right: Callable[[Result, bool], bool],
    *,
    doubt: bool,
) -> Result:
    """
    Solve with vmap because the user asked for it.

    :param one_by_one: As for :func:`attempt`, but retains the graph.
    :param is_right: As for :func:`attempt`.
    :param doubt: Whether this graph may differ from others of its kind, by hooks on its tensors.
    :raises VectorizationError: If vmap fails, or would give wrong rows.
    """
    if kind.wrong:
        raise VectorizationError(_WRONG)
    proven = kind.proven
    retained = retain_graph or not proven
    try:
        results = solve(retained)
        clear = not some_are_batched_now()  # as in `_examined`
        if clear and (doubt or kind.operations not in _WORKED):
            _check_nothing_escaped()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if not _blames_vmap(error):
            if isinstance(error, JDCoreError) or not retained:
                raise
            one_by_one()  # raises the same again if vmap is not to blame
        raise VectorizationError(describe_failure(error)) from error
    if not (proven or is_right(results, retain_graph)):
        raise VectorizationError(_WRONG)
    if clear:
        _WORKED.setdefault(kind.operations, 1)
    return results


# Also where the memory of the host ends, for which torch has no class of its own.
_OF_ANY_PASS = "second time|inplace operation|nan values|allocate memory"


def _blames_vmap(error: Exception) -> bool:
    # Errors of ours say themselves what is wrong.
    if isinstance(error, JDCoreError):
        return False
    text = str(error)
    if re.search(r"vmap|[Bb]atch(ing rule|edTensor|ed tensor)|functorch|storage", text):
        return True
    # What operations of torch raise here in other words (sparse factors, dtypes under autocast)
    # single passes do not, but for some.
    return _is_of_torch(error) and not re.search(_OF_ANY_PASS, text)


def _is_of_torch(error: Exception) -> bool:
    """Whether an operation of torch raised it in a pass, not a hook or a function of Python."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__") == "torch.autograd.graph"


def describe_failure(error: Exception) -> str:
    """The operation at fault if the message tells, and the beginning of the message."""
    text = str(error).strip() or type(error).__name__
    operation = re.search(r"aten::\w+", text)
    first_line = text.splitlines()[0].rstrip(".")
    return f"{first_line if operation is None else f'{operation.group()}: {first_line}'}."


def _check_nothing_escaped() -> None:
    """
    Look for batched tensors that outlived vmap, in the ``.grad`` of a tensor or kept by a hook.

    Whether an intermediate tensor retains its gradient, or has a hook that stores it, cannot be
    read off the graph. Looking at all tensors takes tens of milliseconds, so it is done rarely.

    :raises _EscapeError: If there is one; it has been removed from the ``.grad``.
    """
    if not _batched_tensors():
        return
    gc.collect()  # they may only be in the traceback of an earlier failure
    found = _batched_tensors()
    for holder in found:
        if not is_batched(holder):
            holder.grad = None
    note_left(found)
    if found:
        raise _EscapeError(
            "vmap would leave batched tensors behind: an intermediate tensor retains its gradient "
            "(retain_grad) or has a hook that stores it"
        )


class _EscapeError(RuntimeError):
    """A batched tensor outlived the vmap that made it."""


def _batched_tensors() -> list[Tensor]:
    """Tensors that are batched, or whose ``.grad`` is, but for what earlier passes left."""
    return [
        tensor
        for tensor in living(Tensor)
        if (is_batched(tensor) and not is_known_to_be_left(tensor))
        or (_has_grad(tensor) and is_batched(tensor.grad))
    ]


def _has_grad(tensor: Tensor) -> bool:
    # Asking an intermediate tensor that does not retain its gradient for it causes a warning.
    try:
        return (tensor.retains_grad or tensor.is_leaf) and tensor.grad is not None
    except RuntimeError:  # one of several views that torch allows no more, as somebody wrote there
        return False
