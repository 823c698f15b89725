from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import Parameter

from jdcore.autogram._accumulator import Accumulator
from jdcore.autogram._scratch import CAPACITY, pieces
from jdcore.autogram.blocks._block import Block, Gradients


class SumBlock(Block):
    """
    The sum of blocks of different forms, for a parameter that is used in different ways.

    :param blocks: Blocks of one and the same parameter each.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._blocks = blocks
        self.dtype = blocks[0].dtype
        self.columns = ((blocks[0].columns[0][0], None),)

    def add_gramian(self, gramian: Accumulator) -> None:
        parameter, _ = self.columns[0]
        length = parameter.shape[0] if parameter.ndim else 1
        largest = CAPACITY // max(1, gramian.rows * parameter[:1].numel())
        for start, stop in pieces(length, largest):
            gramian.add_rows(self.rows(start, stop))

    def add_weighted(self, weights: Tensor, gradients: Gradients) -> None:
        for block in self._blocks:
            block.add_weighted(weights, gradients)

    def rows(self, start: int, stop: int) -> Tensor:
        total = self._blocks[0].rows(start, stop)
        for block in self._blocks[1:]:
            total = total + block.rows(start, stop)
        return total


def combined(blocks: Sequence[Block]) -> list[Block]:
    """
    Blocks of which no two share a column, so that their Gramians add up.

    A parameter that several calls, layers or rules use gets one block: the sum of its Jacobians,
    including what their products have in common.
    """
    if len(blocks) == 1:
        return list(blocks)
    return [block for group in _groups(blocks) for block in _disjoint(group)]


def _groups(blocks: Sequence[Block]) -> list[list[Block]]:
    """Blocks that share columns, directly or through others, come together."""
    groups: list[list[Block]] = []
    users: dict[Parameter, list[Block]] = {}
    for block in blocks:
        near = {id(u) for p, _ in block.columns for u in users.get(p, ()) if _overlap(u, block)}
        touched = [g for g in groups if any(id(b) in near for b in g)] if near else []
        groups = [g for g in groups if g not in touched] if touched else groups
        groups.append([b for g in touched for b in g] + [block])
        for parameter, _ in block.columns:
            users.setdefault(parameter, []).append(block)
    return groups


def _overlap(a: Block, b: Block) -> bool:
    return any(
        p is q and (s is None or t is None or (s[0] < t[1] and t[0] < s[1]))
        for p, s in a.columns
        for q, t in b.columns
    )


def _disjoint(group: list[Block]) -> list[Block]:
    first = group[0]
    if len(group) == 1:
        return group
    if all(type(b) is type(first) and b.columns == first.columns for b in group):
        merged = first.merged(group[1:])
        if merged is not None:
            return [merged]
    parts = [part for block in group for part in block.split()]
    return combined(parts) if len(parts) > len(group) else [SumBlock(parts)]
