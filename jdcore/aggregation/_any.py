from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

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
    :raises ParameterError: If the aggregator returns anything else than vectors of these shapes.
    """
    # By its name, as a comparison with the protocol takes as long as a few rows take to be weighed.
    blockwise: Any = getattr(aggregator, "aggregate_blocks", None)
    if not callable(blockwise):
        return _of_matrix(aggregator, blocks, losses, second), None
    known = taken_by(blockwise, losses=losses, second=second)
    vectors, weights = blockwise(blocks, **known)
    expected = [(block.shape[1],) for block in blocks]
    got = [tuple(v.shape) if holds_real_numbers(v) else describe_tensor(v) for v in vectors]
    if got != expected:
        raise ParameterError(
            "aggregator", f"one that returns real vectors of shapes {expected}", f"shapes {got}"
        )
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
