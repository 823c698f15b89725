from __future__ import annotations

import gc
import re
import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from attrs import frozen
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge

from jdcore.errors import VectorizationError, VectorizationWarning
from jdcore.graph import Reach

Result = TypeVar("Result")


@frozen
class Kind:
    """
    What vmap can know of a graph before it is tried.

    :param operations: Names of the operations in it.
    :param size: Number of operations in it.
    :param custom: Whether Python code runs in the backward pass: custom functions, checkpoints,
        compiled regions. They may not expect batched tensors.
    """

    operations: frozenset[str]
    size: int
    custom: bool

    @staticmethod
    def of(reach: Reach) -> Kind:
        """The kind of the graph that was walked."""
        nodes = reach.nodes
        names = frozenset(node.name() for node in nodes)
        return Kind(names, len(nodes), any(isinstance(n, BackwardCFunction) for n in nodes))

    @property
    def worth_vmap(self) -> bool:
        """False if vmap is known to fail or to be slow."""
        slow = any("Conv" in name for name in self.operations)
        return not (slow or self.custom or self.failed)

    @property
    def failed(self) -> bool:
        """Whether vmap has failed on such a graph before."""
        return self.operations in _FAILED


# Operations of graphs for which vmap has worked, or failed, in this process.
_WORKED: set[frozenset[str]] = set()
_FAILED: set[frozenset[str]] = set()


def batched_gradients(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor] | Sequence[GradientEdge],
    cotangents: Sequence[Tensor],
    retain_graph: bool,
) -> list[Tensor | None]:
    """
    Differentiate several rows in one pass.

    :param cotangents: Initial Jacobians ``[m, *S_output]``, one per output.
    :returns: One tensor ``[m, *S_input]`` per input, None where no output depends on it.
    """
    reached: list[int] = []

    def row(*gradients: Tensor) -> list[Tensor]:
        results = torch.autograd.grad(
            outputs, inputs, gradients, retain_graph=retain_graph, allow_unused=True
        )
        reached.extend(i for i, result in enumerate(results) if result is not None)
        return [result for result in results if result is not None]

    with warnings.catch_warnings():
        # vmap runs an operator that it cannot batch row by row, as we would do without it.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        results = torch.vmap(row)(*cotangents)
    found: list[Tensor | None] = [None] * len(inputs)
    for i, result in zip(reached, results, strict=True):
        found[i] = result
    return found


def attempt(
    kind: Kind,
    solve: Callable[[bool], Result],
    retain_graph: bool,
    one_by_one: Callable[[], Result],
) -> Result:
    """
    Solve with vmap if it works; else one by one, with one warning for each kind of graph.

    :param solve: Differentiates with vmap; its argument says whether to retain the graph.
    :param one_by_one: Differentiates without.
    """
    if kind.operations in _WORKED:
        # From here on there is no way back: what vmap has passed through is freed.
        return insist(kind, solve, retain_graph)
    try:
        results = solve(True)
        _check_nothing_escaped()
    except Exception as error:
        # Any exception: what a broken batching rule raises is not specified.
        reason = describe_failure(error)
    else:
        _WORKED.add(kind.operations)
        return results
    results = one_by_one()  # raises the same again if vmap is not to blame
    _FAILED.add(kind.operations)
    warnings.warn(VectorizationWarning(reason), stacklevel=2)
    return results


def insist(kind: Kind, solve: Callable[[bool], Result], retain_graph: bool) -> Result:
    """
    Solve with vmap because the user asked for it.

    :raises VectorizationError: If vmap fails.
    """
    try:
        results = solve(retain_graph)
        if kind.operations not in _WORKED:
            _check_nothing_escaped()
    except Exception as error:
        if _blames_vmap(error):
            raise VectorizationError(describe_failure(error)) from error
        raise
    _WORKED.add(kind.operations)
    return results


def _blames_vmap(error: Exception) -> bool:
    text = str(error)
    return bool(re.search(r"vmap|[Bb]atch(ing rule|edTensor|ed tensor)|functorch|storage", text))


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
    read off the graph. Looking at all tensors takes tens of milliseconds, so it is done once for
    each kind of graph.

    :raises _EscapeError: If there is one; it has been removed from the ``.grad``.
    """
    if not _batched_tensors():
        return
    gc.collect()  # they may only be in the traceback of an earlier failure
    found = _batched_tensors()
    for holder in found:
        if not _is_batched(holder):
            holder.grad = None
    if found:
        raise _EscapeError(
            "vmap would leave batched tensors behind: an intermediate tensor retains its gradient "
            "(retain_grad) or has a hook that stores it"
        )


class _EscapeError(RuntimeError):
    """A batched tensor outlived the vmap that made it."""


def _batched_tensors() -> list[Tensor]:
    """Tensors that are batched, or whose ``.grad`` is."""
    # type() and not isinstance(), which runs code of lazy objects.
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    return [t for t in tensors if _is_batched(t) or (_has_grad(t) and _is_batched(t.grad))]


def _has_grad(tensor: Tensor) -> bool:
    # Asking an intermediate tensor that does not retain its gradient for it causes a warning.
    return (tensor.is_leaf or tensor.retains_grad) and tensor.grad is not None


def _is_batched(tensor: Tensor | None) -> bool:
    return tensor is not None and torch._C._functorch.is_batchedtensor(tensor)
