from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from jdcore._fields import check_grads, check_jac, free_jac, get_jac, write_grads
from jdcore.autojac import _checks as checks
from jdcore.autojac._aggregate import aggregate
from jdcore.autojac._matrix import as_matrix
from jdcore.errors import ParameterError, ParameterTypeError
from jdcore.protocols import Aggregator
from jdcore.validators import describe_tensor


@torch.no_grad()
def jac_to_grad(
    tensors: Tensor | Iterable[Tensor], /, aggregator: Aggregator, *, retain_jac: bool = False
) -> Tensor | None:
    """
    Aggregate the ``.jac`` of tensors into their ``.grad``.

    The Jacobians of all the tensors count as one matrix; call it once per group of parameters to
    aggregate group by group. The update is added to a ``.grad`` that is already there. An
    aggregator of the Gramian kind never sees the matrix in one piece: its memory is that of the
    ``.jac`` fields and the gradients. Tensors without ``.jac`` are skipped, as optimizers skip
    parameters without ``.grad``. Nothing changes if the call fails.

    :param tensors: Usually the parameters of a model; repetitions count once.
    :param aggregator: Maps the matrix [m, n] to the update [n]; a plain function will do. Where
        the tensors differ in dtype, a function gets the matrix in the promoted dtype.
    :param retain_jac: Whether to keep the ``.jac`` fields, which are removed otherwise.
    :returns: The weights [m] of the rows, or None if the aggregator does not tell.
    :raises ParameterError: If no tensor has a ``.jac``, or their shapes do not fit together, or the
        aggregator returns something else than one entry per column.

    >>> import torch
    >>> from jdcore.autojac import backward, jac_to_grad
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> backward([w.sum(), (w**2).sum()])
    >>> jac_to_grad(w, lambda jacobian: jacobian.mean(dim=0))
    >>> w.grad
    tensor([1.5000, 2.5000])
    """
    given = dict.fromkeys(checks.tensor_list(tensors, "tensors"))
    if not callable(aggregator):
        raise ParameterTypeError("aggregator", "an Aggregator or a function", repr(aggregator))
    checks.check_flag(retain_jac, "retain_jac")
    jacobians = _jacobians(given)
    check_grads(jacobians)
    blocks = [as_matrix(jacobian) for jacobian in jacobians.values()]
    vectors, weights = aggregate(aggregator, blocks)
    pairs = zip(jacobians, vectors, strict=True)
    gradients = {tensor: vector.view(tensor.shape) for tensor, vector in pairs}
    check_grads(gradients)  # again: the aggregator may have changed them
    if not retain_jac:
        for tensor in jacobians:
            free_jac(tensor)
    write_grads(gradients)
    return weights


def _jacobians(tensors: Iterable[Tensor]) -> dict[Tensor, Tensor]:
    found: dict[Tensor, Tensor] = {}
    for tensor in tensors:
        jacobian = get_jac(tensor)
        if jacobian is not None:
            _check_jacobian(tensor, jacobian, found)
            found[tensor] = jacobian
    if not found:
        raise ParameterError(
            "tensors",
            "tensors of which at least one has a .jac",
            "tensors that have none",
            "Call backward or mtl_backward first; jac_to_grad removes .jac unless retain_jac=True.",
        )
    return found


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
