from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from jdcore.aggregation._answers import checked_vectors, shape_of
from jdcore.aggregation._columns import widest
from jdcore.aggregation._source import taken_by
from jdcore.aggregation._weigh import Result
from jdcore.errors import ParameterError
from jdcore.validators import describe_tensor, holds_real_numbers


def vectors_of(
    aggregator: Any,
    blocks: Sequence[Tensor],
    losses: Tensor | None = None,
    second: Sequence[Tensor] | None = None,
) -> Result:
    """
    Aggregate a Jacobian given as column blocks, in one piece only if the aggregator needs it so.

    :param aggregator: Any :class:`~jdcore.Aggregator`, also a plain function.
    :param losses: Values of the objectives, for an aggregator that takes them.
    :param second: Column blocks of a second batch, for an aggregator that takes them.
    :returns: One vector per block as the aggregator gives it, in whatever dtype and memory, and the
        weights [m] of the rows or None.
    :raises ParameterError: If the aggregator returns anything else.
    """
    # By its name, as a comparison with the protocol takes as long as a few rows take to be weighed.
    blockwise: Any = getattr(aggregator, "aggregate_blocks", None)
    if not callable(blockwise):
        return _of_matrix(aggregator, blocks, losses, second), None
    known = taken_by(blockwise, losses=losses, second=second)
    answer = blockwise(blocks, **known)
    if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], Sequence)):
        expected = "one whose aggregate_blocks returns a list of vectors, and weights or None"
        raise ParameterError("aggregator", expected, f"one that returns {describe_tensor(answer)}")
    vectors, weights = checked_vectors(answer[0], blocks), answer[1]
    m = blocks[0].shape[0]
    if weights is not None and shape_of(weights) != (m,):
        expected = f"one that returns real weights of shape [{m}], or None"
        raise ParameterError("aggregator", expected, describe_tensor(weights))
    return vectors, weights


def _of_matrix(
    aggregator: Any,
    blocks: Sequence[Tensor],
    losses: Tensor | None,
    second: Sequence[Tensor] | None,
) -> list[Tensor]:
    """The same for an aggregator that knows no blocks, for which the Jacobian is put together."""
    other = None if second is None else _joined(second)
    vector = aggregator(_joined(blocks), **taken_by(aggregator, losses=losses, second=other))
    n = sum(block.shape[1] for block in blocks)
    if not holds_real_numbers(vector) or vector.shape != (n,):
        raise ParameterError(
            "aggregator",
            f"a function that returns a real Tensor of shape [{n}]",
            f"one that returns {describe_tensor(vector)}",
        )
    return list(torch.split(vector, [block.shape[1] for block in blocks]))


def _joined(blocks: Sequence[Tensor]) -> Tensor:
    dtype = widest(blocks)
    return torch.cat([block.to(dtype) for block in blocks], dim=1)
