from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce

import torch
from torch import Tensor

from jdcore.aggregation._source import taken_by
from jdcore.errors import ParameterError
from jdcore.protocols import Aggregator, BlockwiseAggregator
from jdcore.validators import describe_tensor


def aggregate(
    aggregator: Aggregator,
    blocks: Sequence[Tensor],
    losses: Tensor | None = None,
    second: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], Tensor | None]:
    """
    Aggregate a Jacobian given as column blocks, in one piece only if the aggregator needs it so.

    :param losses: Values of the objectives, for an aggregator that takes them.
    :param second: Column blocks of a second batch, for an aggregator that takes them.
    :returns: One vector per block in its dtype, sharing memory with no other tensor, and the
        weights of the rows or None.
    :raises ParameterError: If the aggregator returns vectors of another shape.
    """
    if isinstance(aggregator, BlockwiseAggregator):
        known = taken_by(aggregator.aggregate_blocks, losses=losses, second=second)
        vectors, weights = aggregator.aggregate_blocks(blocks, **known)
        _check_vectors(vectors, blocks)
        pairs = zip(vectors, blocks, strict=True)
        return [_own(vector.detach(), block) for vector, block in pairs], weights
    other = None if second is None else _matrix(second)
    known = taken_by(aggregator, losses=losses, second=other)
    return _aggregate_matrix(partial(aggregator, **known), blocks), None


def _matrix(blocks: Sequence[Tensor]) -> Tensor:
    dtype = reduce(torch.promote_types, (block.dtype for block in blocks))
    return torch.cat([block.to(dtype) for block in blocks], dim=1)


def _aggregate_matrix(aggregator: Aggregator, blocks: Sequence[Tensor]) -> list[Tensor]:
    vector = aggregator(_matrix(blocks))
    n = sum(block.shape[1] for block in blocks)
    if not isinstance(vector, Tensor) or vector.shape != (n,):
        raise ParameterError(
            "aggregator", f"a function that returns a Tensor of shape [{n}]", _word(vector)
        )
    pieces = torch.split(vector.detach(), [block.shape[1] for block in blocks])
    return [p.to(b, copy=True) for p, b in zip(pieces, blocks, strict=True)]


def _check_vectors(vectors: Sequence[Tensor], blocks: Sequence[Tensor]) -> None:
    expected = [(block.shape[1],) for block in blocks]
    got = [tuple(v.shape) if isinstance(v, Tensor) else describe_tensor(v) for v in vectors]
    if got != expected:
        raise ParameterError(
            "aggregator", f"one that returns vectors of shapes {expected}", f"shapes {got}"
        )


def _own(vector: Tensor, block: Tensor) -> Tensor:
    """The vector in dtype and on the device of its block, but not in its memory."""
    shared = vector.untyped_storage().data_ptr() == block.untyped_storage().data_ptr()
    return vector.to(block, copy=shared)


def _word(value: object) -> str:
    return f"one that returns {describe_tensor(value)}"
