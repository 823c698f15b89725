from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from jdcore.errors import ParameterError
from jdcore.protocols import Aggregator, BlockwiseAggregator
from jdcore.validators import describe_tensor


def aggregate(
    aggregator: Aggregator, blocks: Sequence[Tensor]
) -> tuple[list[Tensor], Tensor | None]:
    """
    Aggregate a Jacobian given as column blocks, in one piece only if the aggregator needs it so.

    :returns: One vector per block in its dtype, sharing memory with no other tensor, and the
        weights of the rows or None.
    :raises ParameterError: If the aggregator returns vectors of another shape.
    """
    if isinstance(aggregator, BlockwiseAggregator):
        vectors, weights = aggregator.aggregate_blocks(blocks)
        _check_vectors(vectors, blocks)
        pairs = zip(vectors, blocks, strict=True)
        return [_own(vector.detach(), block) for vector, block in pairs], weights
    return _aggregate_matrix(aggregator, blocks), None


def _aggregate_matrix(aggregator: Aggregator, blocks: Sequence[Tensor]) -> list[Tensor]:
    dtype = reduce(torch.promote_types, (block.dtype for block in blocks))
    vector = aggregator(torch.cat([block.to(dtype) for block in blocks], dim=1))
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
