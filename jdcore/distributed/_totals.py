from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from jdcore.distributed._meeting import Group, Meeting, Stage
from jdcore.distributed._transfers import buckets_of, mean_rows
from jdcore.errors import ParameterError


def mean_gradients(
    meeting: Meeting, group: Group, gradients: Mapping[Tensor, Tensor]
) -> dict[Tensor, Tensor]:
    """
    The mean over processes of gradients with respect to the same tensors.

    :param gradients: Those of this process, in the order in which the graph has the tensors.
    :raises ParameterError: If the processes have gradients of different tensors.
    """
    if not meeting.agree_on(Stage.UPDATE, [(tuple(t.shape), t.dtype) for t in gradients]):
        raise ParameterError(
            "output",
            "computed by the same parameters on all processes",
            f"losses of {len(gradients)} parameters here, others elsewhere",
        )
    tensors = list(gradients)
    own = [_row(gradient) for gradient in gradients.values()]
    means = mean_rows(meeting, buckets_of(tensors, 1, group), own, 1)
    return {t: mean.view(t.shape) for t, mean in zip(tensors, means, strict=True)}


def _row(gradient: Tensor) -> Tensor:
    dense = gradient if gradient.layout == torch.strided else gradient.to_dense()
    return dense.reshape(1, -1)
