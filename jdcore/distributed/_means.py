from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from jdcore.distributed._meeting import Meeting, Stage
from jdcore.distributed._replicated_step import check_group
from jdcore.errors import ParameterError, ParameterTypeError
from jdcore.validators import describe_tensor


def global_means(
    sums: Tensor | Sequence[Tensor], counts: Tensor | Sequence[float], *, group: Any = None
) -> list[Tensor]:
    """
    Losses of this process whose mean over processes is the mean over the samples of all of them.

    What a step on several processes averages are the losses of the processes. Means over a batch
    are right for that only if all batches are equally large and hold all tasks. Sums over a batch,
    times the number of processes and divided by the number of samples of all, always are. A task
    that has no sample here is a loss of 0 that still has a graph, which is what sharded parameters
    need; a task that has no sample anywhere is a row of zeros.

    :param sums: One loss per task: its sum over the samples of this process, a scalar that requires
        grad also where there is no sample (``0 * output.sum()``).
    :param counts: Number of samples (or their total weight) of each task on this process.
    :param group: The process group. By default all processes.
    :returns: One loss per task, to be given to ``backward`` or ``mtl_backward``.
    :raises ParameterError: If the numbers of sums and counts differ, or a count is negative or not
        finite.
    :raises PeerError: If another process could not take part.

    >>> import torch
    >>> from jdcore.distributed import global_means
    >>> global_means([torch.tensor(6.0), torch.tensor(4.0)], [3, 0])  # without other processes
    [tensor(2.), tensor(0.)]
    """
    if group is None:
        if not (dist.is_available() and dist.is_initialized()):
            losses = _checked_sums(sums)
            return _scaled(losses, _checked_counts(losses, counts), 1)
        group = dist.group.WORLD
    chosen = check_group(group)
    # The counts may be on the CPU while the backend exchanges tensors of the losses' device alone.
    first = next(iter(sums), None) if isinstance(sums, (Tensor, list, tuple)) else None
    device = first.device if isinstance(first, Tensor) else torch.device("cpu")
    with Meeting([chosen], device) as meeting:
        losses = _checked_sums(sums)
        own = _checked_counts(losses, counts).to(device)
        if not meeting.agree_on(Stage.START, len(own)):
            raise ParameterError(
                "counts", "of the same number of tasks on all processes", f"{len(own)} here"
            )
        total = meeting.total(Stage.LOSSES, own)
    return _scaled(losses, total, meeting.size)


def _checked_sums(sums: Tensor | Sequence[Tensor]) -> list[Tensor]:
    is_vector = isinstance(sums, Tensor) and sums.ndim == 1
    losses = list(sums) if is_vector or isinstance(sums, (list, tuple)) else None
    if losses is None or not all(isinstance(t, Tensor) and t.ndim == 0 for t in losses):
        expected = "a vector, or a list of Tensors that are scalars"
        raise ParameterTypeError("sums", expected, describe_tensor(sums))
    return losses


def _checked_counts(losses: list[Tensor], counts: Tensor | Sequence[float]) -> Tensor:
    expected = f"{len(losses)} numbers, one for each sum"
    try:
        # In float32, the factors would cost 1e-8.
        device = counts.device if isinstance(counts, Tensor) else "cpu"
        given = torch.as_tensor(counts, dtype=torch.float64, device=device).detach()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ParameterTypeError("counts", expected, describe_tensor(counts)) from None
    if given.shape != (len(losses),):
        raise ParameterError("counts", expected, describe_tensor(given))
    if not bool(((given >= 0) & given.isfinite()).all()):
        raise ParameterError("counts", "finite and >= 0", given.tolist())
    return given


def _scaled(losses: list[Tensor], total: Tensor, size: int) -> list[Tensor]:
    # A task without a sample anywhere has a factor that is finite and not used.
    factors = (size / total.clamp_min(torch.finfo(total.dtype).tiny)).tolist()
    present = (total > 0).tolist()
    pairs = zip(losses, factors, present, strict=True)
    return [loss * (factor if there else 0.0) for loss, factor, there in pairs]
