from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from jdcore._fields import write_grads
from jdcore._modes import plain_modes
from jdcore.aggregation import GramianAggregator
from jdcore.autojac._backward import reached
from jdcore.autojac._gradients import as_matrix
from jdcore.autojac._initial import Call
from jdcore.autojac._jac_to_grad import aggregate_blocks
from jdcore.distributed._sharding import local_part
from jdcore.distributed._step import LocalRows
from jdcore.distributed._teams import Team
from jdcore.graph import reach


def gramian_step(
    outputs: Sequence[Tensor],
    weighting: Callable[[Tensor], Tensor],
    inputs: Tensor | Iterable[Tensor] | None,
    team: Team,
    *,
    retain_graph: bool,
) -> Tensor:
    """
    :func:`~jdcore.autojac.gramian_backward` for tensors that several processes hold together.

    The rows of this process are held until the processes have aggregated them.

    :param team: How the processes hold the tensors.
    """
    call = Call(list(outputs), None, reach(outputs))
    targets = reached(call.graph, inputs)

    # Called inside of the step of all processes, so that an error is told to the others instead of
    # leaving them waiting.
    def local() -> LocalRows:
        rows = call.jacobian(targets, retain_graph=retain_graph)()
        return LocalRows({target: as_matrix(local_part(rows[target])) for target in targets})

    with plain_modes([*outputs, *targets]):
        update = team.aggregate(
            local, GramianAggregator(weighting), list(outputs), aggregate_blocks
        )
    write_grads(update.gradients)
    assert update.weights is not None
    return update.weights
