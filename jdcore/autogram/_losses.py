from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from jdcore.distributed._sharding import is_dtensor, still_trainable
from jdcore.errors import ParameterError, ParameterTypeError
from jdcore.graph import Objectives, is_transformed, reach
from jdcore.validators import describe_tensor, is_frozen, tensor_list


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
        if not output.is_floating_point():
            raise ParameterTypeError(label, "a floating Tensor", describe_tensor(output))
        if is_transformed(output):
            raise ParameterError(
                label,
                "computed outside of the transforms of torch.func",
                "a tensor inside of vmap, grad or jvp",
                "Let the transform return the losses, and call autogram on these.",
            )
        kind = _unusable_kind(output) or _own_kind(output)
        if kind is not None:
            raise ParameterError(
                label,
                "dense, in memory",
                f"{describe_tensor(output)}, which is {kind}",
                "Compute the losses as one dense tensor, such as torch.stack of them.",
            )
        # By identity, since `in` would compare the entries of tensors.
        if any(output is other for other in outputs[:i]):
            raise ParameterError(
                label,
                "another tensor than those before it",
                "one that came already",
                "If an objective is really meant twice, give a copy: tensor.clone().",
            )
    # With samples, a leaf as losses has no operation that could show where the samples are.
    one = isinstance(losses, Tensor) and batch_dim is not None and losses.grad_fn is None
    if one or not any(output.requires_grad for output in outputs):
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
        return still_trainable(reach(objectives.outputs).leaves)
    given = tensor_list(inputs, "inputs")
    for i, tensor in enumerate(given):
        label = f"inputs[{i}]"
        if is_frozen(tensor):  # of any kind, such as the integers of quantized layers
            continue
        if not tensor.is_floating_point():
            raise ParameterTypeError(
                label, "a Tensor of a real floating dtype", describe_tensor(tensor)
            )
        if not tensor.requires_grad:
            raise ParameterError(
                label, "a tensor that requires grad", describe_tensor(tensor) + " that does not"
            )
        if not tensor.is_leaf and objectives.batch_dim is not None:
            raise ParameterError(
                label,
                "a leaf where `batch_dim` is given",
                "the result of an operation",
                "Detach it and let the detached tensor require grad.",
            )
        if not tensor.is_leaf and not tensor.retains_grad:
            raise ParameterError(
                label,
                "a leaf, or a tensor that retains its gradient",
                describe_tensor(tensor),
                "Call .retain_grad() on it before.",
            )
    # Frozen parameters are skipped, as optimizers skip them: fine-tuning passes all of a model.
    return [tensor for tensor in dict.fromkeys(given) if tensor.requires_grad]


def refuse_divided(outputs: Sequence[Tensor]) -> None:
    """
    Refuse losses that are divided among processes.

    :raises ParameterError: If one is a DTensor.
    """
    for output in outputs:
        if is_dtensor(output):
            raise ParameterError(
                "output",
                "a tensor of this process",
                f"{describe_tensor(output)} that is a DTensor",
                "Give losses.full_tensor(), or losses.to_local() for the samples of this process.",
            )


def refuse_unusable(wanted: Sequence[Tensor], parameter: str) -> None:
    """
    Refuse tensors that have no dense real gradient in this process.

    :raises ParameterError: Naming the kind of tensor.
    """
    for tensor in wanted:
        kind = _unusable_kind(tensor)
        if kind is not None:
            raise ParameterError(
                parameter,
                "dense and real, in memory",
                f"{describe_tensor(tensor)}, which is {kind}",
                "Freeze it (requires_grad_(False)), or use a dense real tensor in its place.",
            )


def _unusable_kind(tensor: Tensor) -> str | None:
    """What keeps a tensor from being dense and real, and in memory."""
    if tensor.is_complex():
        return "complex"
    if tensor.is_nested:
        return "nested"
    if tensor.layout != torch.strided:
        return f"of the layout {str(tensor.layout).removeprefix('torch.')}"
    return "on the meta device" if tensor.is_meta else None


def _own_kind(tensor: Tensor) -> str | None:
    """What keeps losses from having numbers of their own: those of wrappers are somewhere else."""
    # Of those divided among processes there is more to say than this.
    if type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__ or is_dtensor(tensor):
        return None
    return f"a {type(tensor).__name__} with a __torch_dispatch__ of its own"
