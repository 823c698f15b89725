from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from jdcore._compilation import not_traced
from jdcore._differentiable import check_differentiable
from jdcore._modes import plain_modes
from jdcore.autojac._initial import begun, inputs_or_leaves
from jdcore.distributed._passes import is_spread
from jdcore.distributed._sharding import Gathered
from jdcore.errors import ParameterError
from jdcore.graph import Reach
from jdcore.graph._retained import put_back_on_failure
from jdcore.validators import describe_tensor


@not_traced
def jac(
    outputs: Tensor | Sequence[Tensor],
    /,
    inputs: Tensor | Iterable[Tensor] | None = None,
    *,
    jac_outputs: Tensor | Sequence[Tensor] | None = None,
    retain_graph: bool = False,
    parallel_chunk_size: int | None = None,
) -> tuple[Tensor, ...]:
    """
    Compute and return the Jacobian of the outputs with respect to the inputs.

    The analogue of :func:`torch.autograd.grad` for several objectives: nothing is accumulated, no
    field of any tensor changes. The Jacobian with respect to an input that the outputs do not
    depend on is zero. Calls compose by the chain rule through ``jac_outputs``.

    With respect to parameters that are divided among processes (``fully_shard``, tensor
    parallelism), it is the mean over the processes, divided as they are; ``inputs`` are parameters
    then.

    :param outputs: What to differentiate. All their elements, in order, are the m objectives.
    :param inputs: Tensors that require grad, leaves or not. By default all leaves behind
        ``outputs``.
    :param jac_outputs: Initial Jacobians, one of shape ``[m, *S]`` per output of shape S, with the
        same m: the Jacobian is multiplied by them from the left. By default the identity.
    :param retain_graph: Whether to keep the graph for another differentiation.
    :param parallel_chunk_size: How many rows to differentiate at once (by vmap), 1 meaning one by
        one. None lets the library choose what is fast and works.
    :returns: One Jacobian of shape ``[m, *S]`` per input of shape S.
    :raises ParameterError: If an argument does not fit; see its message.

    >>> import torch
    >>> from jdcore.autojac import jac
    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> y = x**2
    >>> jac(y, x)
    (tensor([[2., 0.],
            [0., 4.]]),)
    """
    names = "outputs", "jac_outputs"
    with begun(
        *(outputs, jac_outputs, inputs, names),
        retain_graph=retain_graph,
        chunk_size=parallel_chunk_size,
    ) as call:
        targets = _targets(call.graph, call.inputs)
        graph = call.jacobian(targets, retain_graph=retain_graph, chunk_size=parallel_chunk_size)
        with plain_modes([*call.outputs, *targets]), put_back_on_failure(call.graph):
            results = graph()
    return tuple(results[target] for target in targets)


def _targets(found: Reach, inputs: Tensor | Iterable[Tensor] | None) -> list[Tensor]:
    gathered = Gathered()
    # Leaves of a graph under FSDP2 are gathered parameters that nobody holds: the answer is given
    # for those that optimizers know.
    targets = gathered.shards(inputs_or_leaves(found, inputs))
    check_differentiable(targets, "inputs")
    spread = is_spread([*targets, *found.leaves])
    for i, target in enumerate(targets):
        if not target.requires_grad:
            raise ParameterError(
                f"inputs[{i}]",
                "a tensor that requires grad",
                describe_tensor(target) + " that does not",
            )
        if spread and not (target.is_leaf and found.reaches(gathered.leaf(target))):
            raise ParameterError(
                f"inputs[{i}]",
                "a parameter that `outputs` depend on, where some are divided among processes",
                describe_tensor(target),
                "Other tensors belong to the batch of one process: what there is with respect to "
                "them is no mean over the processes.",
            )
    return targets
