from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from jdcore._fields import check_grads, check_jac, free_jac, get_jac, write_grads
from jdcore.aggregation._source import check_losses
from jdcore.autojac import _checks as checks
from jdcore.autojac._aggregate import aggregate
from jdcore.autojac._matrix import as_matrix
from jdcore.distributed._heads import write_means
from jdcore.distributed._sharding import Gathered, local_part
from jdcore.distributed._step import LocalRows, Update, no_jacobians
from jdcore.distributed._teams import find_team
from jdcore.errors import ParameterError, ParameterTypeError
from jdcore.protocols import Aggregator
from jdcore.validators import describe_tensor


@torch.no_grad()
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
    aggregator of the Gramian kind never sees the matrix in one piece: its memory is that of the
    ``.jac`` fields and the gradients. Tensors without ``.jac`` are skipped, as optimizers skip
    parameters without ``.grad``. Nothing changes if the call fails.

    On several processes, what is aggregated is the mean of their Jacobians, and all get the same
    update: for parameters of a ``DistributedDataParallel`` module, and where ``group`` is given.
    Of sharded parameters (``fully_shard``, tensor parallelism) each process updates its part.
    The gradients that ``mtl_backward`` left on the parameters of tasks are averaged with it.

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
    given = list(dict.fromkeys(Gathered().shards(checks.tensor_list(tensors, "tensors"))))
    team = find_team(given, group)
    local = partial(_local, given, aggregator, retain_jac, second)
    if team is None:
        update = _alone(local(), aggregator, losses)
    else:
        update = team.aggregate(local, aggregator, losses, aggregate)
    check_grads(update.gradients)  # again: the aggregator may have changed them
    if not retain_jac:
        for tensor in given:
            if get_jac(tensor) is not None:
                free_jac(tensor)
    write_means(update.means)
    write_grads(update.gradients)
    return update.weights


def _local(
    given: Sequence[Tensor],
    aggregator: Aggregator,
    retain_jac: bool,
    second: Tensor | Sequence[Tensor] | None,
) -> LocalRows:
    """What this process has, checked."""
    if not callable(aggregator):
        raise ParameterTypeError("aggregator", "an Aggregator or a function", repr(aggregator))
    checks.check_flag(retain_jac, "retain_jac")
    jacobians = _jacobians(given)
    check_grads(jacobians)
    matrices = {tensor: as_matrix(local_part(jac)) for tensor, jac in jacobians.items()}
    return LocalRows(matrices, None if second is None else _second(second, given, jacobians))


def _alone(
    local: LocalRows, aggregator: Aggregator, losses: Tensor | Sequence[Tensor] | None
) -> Update:
    if not local.matrices:
        raise no_jacobians("tensors that have none")
    blocks = list(local.matrices.values())
    others = None if local.second is None else list(local.second.values())
    vectors, weights = aggregate(aggregator, blocks, check_losses(losses, len(blocks[0])), others)
    pairs = zip(local.matrices, vectors, strict=True)
    return Update({tensor: vector.view(tensor.shape) for tensor, vector in pairs}, weights=weights)


def _jacobians(tensors: Iterable[Tensor]) -> dict[Tensor, Tensor]:
    found: dict[Tensor, Tensor] = {}
    for tensor in tensors:
        jacobian = get_jac(tensor)
        if jacobian is not None:
            _check_jacobian(tensor, jacobian, found)
            found[tensor] = jacobian
    return found


def _second(
    second: Tensor | Sequence[Tensor], tensors: Iterable[Tensor], jacobians: dict[Tensor, Tensor]
) -> dict[Tensor, Tensor]:
    """Matrices of the second batch, of those tensors that have a ``.jac``."""
    given, wanted = checks.tensor_list(second, "second"), list(tensors)
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


def _check_jacobian(tensor: Tensor, jacobian: Tensor, found: dict[Tensor, Tensor]) -> None:
    check_jac(tensor, jacobian)
    m = len(next(iter(found.values()), jacobian))
    if len(jacobian) != m:
        raise ParameterError(
            ".jac",
            f"of {m} rows, as that of the first tensor",
            describe_tensor(jacobian),
            "Aggregate tensors of different objectives in separate calls.",
        )
