from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from jdcore.graph._graph import Place
from jdcore.graph._memory import Memory
from jdcore.graph.shares import Dense, combined

SHORT = 1 << 16
"""Entries of a row, below which few large products are faster than many small ones."""

_Entry: TypeAlias = "tuple[Place, torch.Size]"


class ShortRows:
    """
    Short rows of many parameters, multiplied together.

    :param keep: Whether :meth:`weighted` will be called.
    """

    def __init__(self, memory: Memory, keep: bool) -> None:
        self._memory, self._keep = memory, keep
        self._groups: dict[tuple[torch.dtype, bool], list[tuple[list[_Entry], Tensor]]] = {}
        self._joined: list[tuple[Tensor, list[_Entry]]] = []

    def add(self, roots: Sequence[Place], share: Dense, counted: bool = False) -> None:
        """
        Add the rows of a share.

        :param roots: Where its gradient belongs; of several layers for one task, those of each,
            and the share has the layers in the place of tasks.
        :param counted: Whether their Gramian is in that of another share.
        """
        if counted and not self._keep:
            return
        rows = share.flat_rows()
        if len(roots) > 1:
            rows = rows.transpose(0, 1).flatten(1)[None]
        entries = [(root, share.shape) for root in roots]
        self._groups.setdefault((rows.dtype, counted), []).append((entries, rows))

    def shares(self) -> Iterator[tuple[Dense, list[Place]]]:
        """What is to be added to the Gramian, and the roots whose rows it is made of."""
        for (_, counted), parts in self._groups.items():
            size = sum([of_roots.numel() for _, of_roots in parts])
            if counted and (self._memory.reused or size > self._memory.joined):
                # Joined rows would be a copy, which costs more than calls do.
                self._joined += [(rows, entries) for entries, rows in parts]
                continue
            rows = [of_roots for _, of_roots in parts]
            joined = torch.cat(rows, 2) if len(rows) > 1 else rows[0]
            entries = [entry for of_rows, _ in parts for entry in of_rows]
            if not counted:
                yield Dense(joined, joined.shape[2:]), [root for root, _ in entries]
            if self._keep:
                self._joined.append((joined, entries))
        self._groups.clear()

    def weighted(self, weights: Tensor) -> dict[Place, Tensor]:
        grads: dict[Place, Tensor] = {}
        for rows, entries in self._joined:
            summed = combined(weights.reshape(-1), rows.flatten(0, 1))
            parts: Sequence[Tensor] = [summed]
            if len(entries) > 1:
                views = torch.split(summed, [shape.numel() for _, shape in entries])
                # In memory of their own, by one call: to keep one of them must not keep all.
                parts = torch._foreach_mul(views, 1.0)
            for (root, shape), part in zip(entries, parts, strict=True):
                if len(shape) != 1:  # most of them are biases, and each view costs a call
                    part = part.view(shape)
                grads[root] = grads[root] + part if root in grads else part
        self._joined.clear()
        return grads
