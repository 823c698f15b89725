from __future__ import annotations

import zlib
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
    layout = zlib.crc32(repr([(tuple(t.shape), str(t.dtype)) for t in gradients]).encode())
    one, other = meeting.agree(Stage.UPDATE, layout, -layout)
    if one is None or other is None or one != -other:
        raise ParameterError(
            "output",
            "computed by the same parameters on all processes",
            f"losses of {len(gradients)} parameters here, others elsewhere",
        )
    tensors = list(gradients)
    own = [_row(gradient) for gradient in gradients.values()]
    means = mean_rows(buckets_of(tensors, 1, group), own, 1)
    return {t: mean.view(t.shape) for t, mean in zip(tensors, means, strict=True)}


def _row(gradient: Tensor) -> Tensor:
    dense = gradient if gradient.layout == torch.strided else gradient.to_dense()
    return dense.reshape(1, -1)
