from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from jdcore._compilation import not_traced
from jdcore._differentiable import refuse_transformed
from jdcore._fields import (
    as_grads,
    check_grads,
    check_jac,
    disjoint,
    free_jacs,
    get_jac,
    write_grads,
)
from jdcore._modes import plain_modes
from jdcore.aggregation._any import vectors_of
from jdcore.aggregation._nested_state import state_kept
from jdcore.aggregation._source import check_losses
from jdcore.aggregation._weigh import check_aggregator
from jdcore.autojac._gradients import as_matrix
from jdcore.distributed._heads import write_means
from jdcore.distributed._sharding import Gathered, local_part, some_dtensor
from jdcore.distributed._step import LocalRows, Update, no_jacobians
from jdcore.distributed._teams import find_team
from jdcore.errors import ParameterError
from jdcore.protocols import Aggregator
from jdcore.validators import check_flag, describe_tensor, tensor_list


@torch.no_grad()
@not_traced
def jac_to_grad(
    tensors: Tensor | Iterable[Tensor],
    /,
    aggregator: Aggregator,
    *,
    retain_jac: bool = False,
    losses: Tensor | Sequence[Tensor] | None = None,
    second: Tensor | Sequence[Tensor] | None = None,
    group: Any = None,
) -> Tensor | None:
    """
    Aggregate the ``.jac`` of tensors into their ``.grad``.

    The Jacobians of all the tensors count as one matrix; call it once per group of parameters to
    aggregate group by group. The update is added to a ``.grad`` that is already there. An
    aggregator of the Gramian kind never needs the matrix in one piece: its memory is that of the
    ``.jac`` fields and the gradients, and at most 2 MB. Tensors without ``.jac`` are skipped, as
    optimizers skip parameters without ``.grad``. Nothing changes if the call fails. At its end, the
    hooks of ``register_post_accumulate_grad_hook``, and of the operations that accumulate, run once
    for each tensor.

    On several processes, what is aggregated is the mean of their Jacobians, and all get the same
    update: for parameters of a ``DistributedDataParallel`` module, and where ``group`` is given.
    Of sharded parameters (``fully_shard``, tensor parallelism) each process updates its part.
    The gradients that ``mtl_backward`` left on the parameters of tasks are averaged with it.

    Products of float32 rows are made in float64, on accelerators as well. Made in float32 and only
    added up in float64, they would take less time, but near Pareto stationarity the update depends
    on combinations of rows that are a millionth of their lengths: on 64 rows of which 40 cancel,
    UPGrad came to conflict with one by an eighth of the mean row.

    :param tensors: Usually the parameters of a model; repetitions count once.
    :param aggregator: Maps the matrix [m, n] to the update [n]; a plain function will do. Where
        the tensors differ in dtype, a function gets the matrix in the promoted dtype.
    :param retain_jac: Whether to keep the ``.jac`` fields, which are removed otherwise.
    :param losses: What was differentiated, in the same order, for aggregators that look at the
        values of the objectives. Others do without.
    :param second: The Jacobians of the same objectives on a second, independent batch, one for each
        tensor, as ``jac(other_losses, tensors)`` returns them: for aggregators that look at the
        cross-Gramian. Others do without.
    :param group: The ``torch.distributed`` process group whose processes all hold these tensors,
        equal and in this order. None finds that of ``DistributedDataParallel``; other tensors are
        then aggregated by this process alone.
    :returns: The weights [m] of the rows, or None if the aggregator does not tell.
    :raises ParameterTypeError: If the aggregator is a weighting.
    :raises ParameterError: If no tensor has a ``.jac``, or their shapes do not fit together, or the
        aggregator returns something else than one entry per column.
    :raises PeerError: If another process could not make this step. None of them writes anything.

    >>> import torch
    >>> from jdcore.autojac import backward, jac_to_grad
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> backward([w.sum(), (w**2).sum()])
    >>> jac_to_grad(w, lambda jacobian: jacobian.mean(dim=0))
    >>> w.grad
    tensor([1.5000, 2.5000])
    """
    # In the form that optimizers know, to which `.jac` and `.grad` belong.
    given = list(dict.fromkeys(Gathered().shards(tensor_list(tensors, "tensors"))))
    team = find_team(given, group)
    local = partial(_local, given, aggregator, retain_jac, second)
    with plain_modes(given):
        if team is None:
            update = _alone(local(), aggregator, losses)
        else:
            update = team.aggregate(local, aggregator, losses, aggregate_blocks)
    # Before the gradients are written: optimizers that step in hooks find this memory free.
    if not retain_jac:
        free_jacs(given)
    # First, since the hooks that follow the others may step an optimizer over these as well.
    write_means(update.means)
    write_grads(update.gradients)
    return update.weights


@not_traced
def zero_jac(tensors: Tensor | Iterable[Tensor], /) -> None:
    """
    Remove the ``.jac`` of tensors, as ``optimizer.zero_grad()`` removes their ``.grad``.

    ``jac_to_grad`` removes what it has used. A step that ends before it (a batch that is skipped,
    an exception that is caught) leaves the ``.jac`` behind, to which the next ``backward`` adds.

    :param tensors: Usually the parameters of a model. Those without ``.jac`` are skipped.
    :raises ParameterTypeError: If something else than tensors is given.

    >>> import torch
    >>> from jdcore.autojac import backward, zero_jac
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> backward([w.sum(), (w**2).sum()])
    >>> zero_jac(w)
    >>> hasattr(w, "jac")
    False
    """
    free_jacs(Gathered().shards(tensor_list(tensors, "tensors")))


def _local(
    given: Sequence[Tensor],
    aggregator: Aggregator,
    retain_jac: bool,
    second: Tensor | Sequence[Tensor] | None,
) -> LocalRows:
    """What this process has, checked."""
    check_aggregator(aggregator)
    refuse_transformed((), "tensors", "Call jac_to_grad outside of the transform.")
    check_flag(retain_jac, "retain_jac")
    jacobians = _jacobians(given)
    check_grads(jacobians)
    parts = jacobians
    if some_dtensor(jacobians.values()):  # asked once, not of each parameter
        parts = {tensor: local_part(jac) for tensor, jac in jacobians.items()}
    matrices = {tensor: as_matrix(part) for tensor, part in parts.items()}
    return LocalRows(matrices, None if second is None else _second(second, given, jacobians))


def _alone(
    local: LocalRows, aggregator: Aggregator, losses: Tensor | Sequence[Tensor] | None
) -> Update:
    if not local.matrices:
        raise no_jacobians("tensors that have none")
    blocks = list(local.matrices.values())
    others = None if local.second is None else list(local.second.values())
    with state_kept(aggregator):
        vectors, weights = aggregate_blocks(
            aggregator, blocks, check_losses(losses, len(blocks[0])), others
        )
        # Everything that may fail comes before the first field is written.
        check_grads(local.matrices)  # again: the aggregator may have changed them
        pairs = zip(local.matrices, vectors, strict=True)
        gradients = as_grads({t: v if t.ndim == 1 else v.view(t.shape) for t, v in pairs})
    return Update(gradients, weights=weights)


def _jacobians(tensors: Iterable[Tensor]) -> dict[Tensor, Tensor]:
    """The ``.jac`` of those tensors that have one, checked."""
    fields = [(tensor, get_jac(tensor)) for tensor in tensors]
    found = {tensor: jacobian for tensor, jacobian in fields if jacobian is not None}
    m: int | None = None
    for tensor, jacobian in found.items():
        check_jac(tensor, jacobian)
        rows = jacobian.shape[0]
        m = rows if m is None else m
        if rows != m:
            raise ParameterError(
                ".jac",
                f"of {m} rows, as that of the first tensor",
                describe_tensor(jacobian),
                "Aggregate tensors of different objectives in separate calls.",
            )
    return found


def _second(
    second: Tensor | Sequence[Tensor], tensors: Iterable[Tensor], jacobians: dict[Tensor, Tensor]
) -> dict[Tensor, Tensor]:
    """Matrices of the second batch, of those tensors that have a ``.jac``."""
    given, wanted = tensor_list(second, "second"), list(tensors)
    if len(given) != len(wanted):
        expected = f"{len(wanted)} Jacobians, one for each tensor"
        raise ParameterError("second", expected, len(given))
    matrices = {}
    for tensor, other in zip(wanted, given, strict=True):
        jacobian = jacobians.get(tensor)
        if jacobian is None:
            continue
        if other.shape != jacobian.shape:
            expected = f"of shape {list(jacobian.shape)}, as .jac"
            raise ParameterError("second", expected, describe_tensor(other))
        matrices[tensor] = as_matrix(local_part(other.detach()))
    return matrices


def aggregate_blocks(
    aggregator: Aggregator,
    blocks: Sequence[Tensor],
    losses: Tensor | None = None,
    second: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], Tensor | None]:
    """
    What :func:`~jdcore.aggregation.vectors_of` gives, in the dtypes of the blocks.

    The vectors share memory with nothing else.
    """
    vectors, weights = vectors_of(aggregator, blocks, losses, second)
    pairs = zip(vectors, blocks, strict=True)
    if not hasattr(aggregator, "aggregate_blocks"):
        # A function may keep its vector: optimizers write into a `.grad`.
        return [vector.detach().to(block, copy=True) for vector, block in pairs], weights
    return _apart([_own(vector, block) for vector, block in pairs]), weights


def _own(vector: Tensor, block: Tensor) -> Tensor:
    """The vector in dtype and on the device of its block, but not in its memory."""
    # A method that picks a row may return a view of the Jacobian, which must not become a `.grad`.
    shared = vector.untyped_storage().data_ptr() == block.untyped_storage().data_ptr()
    if shared or vector.dtype != block.dtype or vector.device != block.device:
        vector = vector.to(block, copy=shared)
    return vector.detach() if vector.requires_grad else vector


def _apart(vectors: list[Tensor]) -> list[Tensor]:
    """The vectors, in memory of their own where a method gives several blocks the same one."""
    # Only then is there more to be found out, which would cost each parameter a few calls.
    return vectors if len(set(map(Tensor.data_ptr, vectors))) == len(vectors) else disjoint(vectors)
