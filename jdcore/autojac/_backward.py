from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from jdcore._compilation import not_traced
from jdcore._differentiable import check_accumulates, check_differentiable, trainable
from jdcore._fields import check_jacs
from jdcore._modes import plain_modes
from jdcore.autojac._hidden import may_reach
from jdcore.autojac._initial import begun, inputs_or_leaves
from jdcore.autojac.transform import AccumulateJac
from jdcore.distributed._replicas import check_replicas
from jdcore.distributed._sharding import Gathered
from jdcore.errors import ParameterError
from jdcore.graph import Reach
from jdcore.graph._retained import put_back_on_failure


@not_traced
def backward(
    tensors: Tensor | Sequence[Tensor],
    /,
    *,
    jac_tensors: Tensor | Sequence[Tensor] | None = None,
    inputs: Tensor | Iterable[Tensor] | None = None,
    retain_graph: bool = False,
    parallel_chunk_size: int | None = None,
) -> None:
    """
    Compute the Jacobian of tensors and accumulate it into the ``.jac`` of the inputs.

    The analogue of :func:`torch.autograd.backward` for several objectives: each element of the
    tensors is one objective, that is one row. The ``.jac`` of an input of shape S has shape
    ``[m, *S]``; :func:`~jdcore.autojac.jac_to_grad` turns it into a ``.grad``. A ``.jac`` that is
    already there is added to: :func:`~jdcore.autojac.zero_jac` removes that of a skipped step.

    A tensor that does not require grad (the loss of a task that is absent from the batch) gives
    zero rows. An input that none of the tensors depends on gets no ``.jac``. Nothing is written
    if the call fails.

    :param tensors: What to differentiate. All their elements, in order, are the m objectives.
    :param jac_tensors: Initial Jacobians, one of shape ``[m, *S]`` per tensor of shape S, with the
        same m: the Jacobian is multiplied by them from the left. By default the identity.
    :param inputs: Tensors with respect to which to differentiate: leaves, or tensors that retain
        their gradient. Frozen parameters are skipped. By default all leaves behind ``tensors``.
        They must be given where functions hide their parameters: reentrant checkpoints, and blocks
        that accumulate into ``.grad`` in a backward pass of their own.
    :param retain_graph: Whether to keep the graph for another differentiation. Otherwise it is
        freed after the last row, whatever the chunk size, but not where the library tries for the
        first time to differentiate several rows at once.
    :param parallel_chunk_size: How many rows to differentiate at once (by vmap), 1 meaning one by
        one. None lets the library choose what is fast and works.
        Under ``fully_shard``, rows one by one take less memory: see docs/distributed.md.
    :raises ParameterError: If an argument does not fit; see its message.
    :raises SinglePassError: If several rows need a pass each through a compiled graph that allows
        one.
    :raises VectorizationError: If several rows cannot be differentiated at once as asked for.

    >>> import torch
    >>> from jdcore.autojac import backward, jac_to_grad
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> backward([w.sum(), (w**2).sum()])
    >>> w.jac
    tensor([[1., 1.],
            [2., 4.]])
    """
    names = "tensors", "jac_tensors"
    with begun(
        *(tensors, jac_tensors, inputs, names),
        retain_graph=retain_graph,
        chunk_size=parallel_chunk_size,
    ) as call:
        targets = reached(call.graph, call.inputs)
        # Before the passes, which take the time and may free the graph.
        check_jacs(targets, call.m)
        # The keys are checked as the graph is put together; nothing is computed before it is
        # called.
        graph = call.jacobian(
            targets,
            watched=call.inputs or (),
            retain_graph=retain_graph,
            chunk_size=parallel_chunk_size,
        ) >> AccumulateJac(targets)
        with plain_modes([*call.outputs, *targets]), put_back_on_failure(call.graph):
            graph()


def reached(found: Reach, inputs: Tensor | Iterable[Tensor] | None) -> list[Tensor]:
    """
    The tensors that accumulate: the inputs given that some outputs depend on, or all leaves.

    Parameters under FSDP2 are in the form that optimizers know.

    :param found: What lies behind the outputs.
    :raises ParameterError: If there are none, or one of those given cannot.
    """
    targets = inputs_or_leaves(found, inputs)
    gathered = Gathered()
    if inputs is None:
        check_differentiable(targets, "inputs")
    else:
        given = trainable(targets, "inputs")
        check_accumulates(given, "inputs")
        targets = may_reach(found, [gathered.leaf(tensor) for tensor in given])
    if not targets:
        raise ParameterError(
            "inputs", "tensors that require grad and that `tensors` depend on", "none"
        )
    check_replicas(targets, [found], "inputs")
    return gathered.shards(targets)
