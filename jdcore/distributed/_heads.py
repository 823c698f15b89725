"""
Gradients of task-specific parameters, which ``mtl_backward`` writes on each process by itself.

No reducer has seen them. They are averaged with the next Jacobian of their group.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from jdcore._accumulators import accumulator_hooks
from jdcore.distributed._meeting import Group
from jdcore.distributed._replicas import replicas_of, several_processes
from jdcore.errors import ParameterError

# By identity and weakly: a parameter that is gone waits for nobody.
_LOCAL: MutableMapping[Tensor, None] = WeakIdKeyDictionary()


def check_can_wait(tensors: Iterable[Tensor], *, spread: bool) -> None:
    """
    Check that gradients of tasks can wait for their mean, before they are computed.

    :param tensors: The parameters of the tasks.
    :param spread: Whether the Jacobian is one of parameters that are divided among processes.
    :raises ParameterError: If what follows a gradient would not wait, or no step takes the mean.
    """
    if not several_processes():
        return
    replicated = [tensor for tensor in tensors if replicas_of([tensor])]
    # Torch keeps the hooks in this field, None if there are none.
    hooked = any(tensor._post_accumulate_grad_hooks for tensor in replicated)
    if hooked or accumulator_hooks(replicated):
        raise ParameterError(
            "tasks_params",
            "without post-accumulate-grad hooks where DistributedDataParallel keeps them equal",
            "one with a hook, such as an optimizer that steps in the backward pass",
            "The hook would see the gradient of one process alone: it is averaged by jac_to_grad. "
            "Step the optimizer of the heads after that.",
        )
    if spread and replicated:
        raise ParameterError(
            "tasks_params",
            "divided among processes where the shared parameters are",
            "parameters of a DistributedDataParallel module beside those of fully_shard",
            "Nothing would average their gradients: apply fully_shard to the heads as well.",
        )


def note_local_gradients(tensors: Iterable[Tensor]) -> None:
    """Remember tensors whose ``.grad`` is that of this process alone."""
    if several_processes():
        for tensor in tensors:
            _LOCAL[tensor] = None


def write_means(means: Mapping[Tensor, Tensor]) -> None:
    """Make the ``.grad`` of tensors the mean over the processes, the same bits on all of them."""
    for tensor, mean in means.items():
        # In place, since optimizers and buckets of reducers may hold the tensor.
        if tensor.grad is not None and tensor.grad.layout == torch.strided:
            tensor.grad.copy_(mean)
        else:
            tensor.grad = mean
        _LOCAL.pop(tensor, None)


def is_local(tensor: Tensor) -> bool:
    """Whether the ``.grad`` of a tensor is to be averaged."""
    return tensor in _LOCAL and tensor.grad is not None


def check_none_left(members: Iterable[Tensor], group: Group) -> None:
    """
    Check that a step averages all gradients that wait for the processes of its group.

    :param members: The tensors that it knows.
    :raises ParameterError: If others of the same group wait.
    """
    known = {id(tensor) for tensor in members}
    for tensor in list(_LOCAL.keys()):
        if id(tensor) in known or not is_local(tensor):
            continue
        if any(replica.process_group is group for replica in replicas_of([tensor])):
            raise ParameterError(
                "tensors",
                "given with the parameters of the tasks, whose gradients are averaged with them",
                "the shared ones, while heads in other DistributedDataParallel modules wait",
                "Pass all parameters; those without .jac only get their mean.",
            )
