from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from jdcore._differentiable import (
    check_accumulates,
    check_distinct,
    check_one,
    dispatches,
    refuse_transformed,
    trainable,
)
from jdcore._modes import refuse_tangents
from jdcore.distributed._sharding import is_dtensor, still_trainable
from jdcore.errors import ParameterError, ParameterTypeError
from jdcore.graph import Objectives
from jdcore.validators import describe_tensor, tensor_list

_REMEDY = "Compute the losses as one dense floating tensor, such as torch.stack of them."
_TRANSFORMED = "Let the transform return the losses, and call autogram on these."


def objectives_of(
    losses: Tensor | Sequence[Tensor], batch_dim: int | None, parameter: str
) -> Objectives:
    """
    Check losses.

    :param parameter: What the argument is called.
    :raises ParameterTypeError: If they are no floating tensors.
    :raises ParameterError: If they have no graph, repeat, or lack the dimension of samples.
    """
    outputs = [losses] if isinstance(losses, Tensor) else _several(losses, batch_dim, parameter)
    for i, output in enumerate(outputs):
        label = parameter if isinstance(losses, Tensor) else f"{parameter}[{i}]"
        check_one(output, label, _REMEDY)
        refuse_transformed([output], label, _TRANSFORMED)
        refuse_tangents([output], label)
        if is_dtensor(output):
            raise ParameterError(
                label,
                "a tensor of this process",
                f"{describe_tensor(output)} that is a DTensor",
                "Give losses.full_tensor(), or losses.to_local() for the samples of this process.",
            )
        if dispatches(output):  # numbers of such a wrapper are somewhere else
            raise ParameterError(
                label,
                "a Tensor with numbers of its own",
                f"a {type(output).__name__} with a __torch_dispatch__ of its own",
                _REMEDY,
            )
    check_distinct(outputs, parameter)
    # With samples, a leaf as losses has no operation that could show where the samples are.
    one = isinstance(losses, Tensor) and batch_dim is not None and losses.grad_fn is None
    if one or True not in [output.requires_grad for output in outputs]:
        raise ParameterError(
            parameter,
            "the result of differentiable operations",
            "a Tensor without a graph",
            "Were they computed under torch.no_grad(), detached, or from frozen parameters only?",
        )
    return Objectives(outputs, _checked_dim(outputs[0], batch_dim))


def shape_of(losses: Tensor | Sequence[Tensor]) -> Sequence[int] | None:
    """The shape of a generalized Gramian; None for the ordinary one, of a vector or of a list."""
    return losses.shape if isinstance(losses, Tensor) and losses.ndim != 1 else None


def _several(losses: Sequence[Tensor], batch_dim: int | None, parameter: str) -> Sequence[Tensor]:
    outputs = tensor_list(losses, parameter)
    if batch_dim is not None:
        raise ParameterTypeError(
            parameter,
            "one Tensor where `batch_dim` is given",
            f"{len(outputs)} of them",
            "Stack them: torch.stack(losses).",
        )
    return outputs


def checked_batch_dim(batch_dim: int | None) -> int | None:
    """
    Check the type of a dimension.

    :raises ParameterTypeError: If it is neither None nor an int.
    """
    if batch_dim is not None and (isinstance(batch_dim, bool) or not isinstance(batch_dim, int)):
        raise ParameterTypeError("batch_dim", "an int or None", repr(batch_dim))
    return batch_dim


def _checked_dim(output: Tensor, batch_dim: int | None) -> int | None:
    if batch_dim is None:
        return None
    if not -output.ndim <= batch_dim < output.ndim:
        raise ParameterError("batch_dim", f"a dimension of {describe_tensor(output)}", batch_dim)
    return batch_dim % output.ndim


def checked_budget(budget: int | None) -> int | None:
    """
    Check a number of bytes.

    :raises ParameterError: If it is neither None nor a positive int.
    """
    if budget is None:
        return None
    if isinstance(budget, bool) or not isinstance(budget, int):
        raise ParameterTypeError("memory_budget", "an int (bytes) or None", repr(budget))
    if budget < 1:
        raise ParameterError("memory_budget", "> 0 or None", budget)
    return budget


def wanted_leaves(objectives: Objectives, inputs: Tensor | Iterable[Tensor] | None) -> list[Tensor]:
    """
    The tensors of a function call: those given, or all leaves behind the losses.

    :raises ParameterTypeError: If one is no floating tensor.
    :raises ParameterError: If there is none, or one cannot take a gradient.
    """
    # Without an engine nobody says which leaves are parameters: inputs that require grad count as
    # well.
    if inputs is None:
        leaves = [leaf for leaf in objectives.walk.leaves.values() if leaf.requires_grad]
        return still_trainable(leaves)
    given = tensor_list(inputs, "inputs")
    found = trainable(given, "inputs")
    for i, tensor in enumerate(given):
        if not tensor.is_leaf and objectives.batch_dim is not None:
            raise ParameterError(
                f"inputs[{i}]",
                "a leaf where `batch_dim` is given",
                "the result of an operation",
                "Detach it and let the detached tensor require grad.",
            )
    check_accumulates(given, "inputs")
    return found
