"""Which module an error of the graph comes from, looked for only where there is one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

from torch import Tensor, nn

from jdcore.distributed._sharding import Gathered


def layer_of(modules: Sequence[nn.Module], tensors: Sequence[Tensor]) -> tuple[str, str] | None:
    """
    The innermost module that has all of some parameters and buffers.

    :returns: Its name and its class; None if none has them all, or only the whole of a model has.
    """
    wanted = set(map(id, Gathered().shards(tensors)))
    found = [
        # Of those with nothing else the one inside of the others, and of its places the first.
        (len(owned), -name.count("."), name, type(module).__name__)
        for name, module in named(modules)
        if name and wanted <= (owned := {*map(id, chain(module.parameters(), module.buffers()))})
    ]
    return min(found, key=lambda one: one[:2])[2:] if wanted and found else None


def named(modules: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """All modules inside of some, with their names, in which several ones have their numbers."""
    for i, module in enumerate(modules):
        yield from module.named_modules(prefix=f"{i}" if len(modules) > 1 else "")
