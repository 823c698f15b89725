from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from jdcore.distributed._replicas import places_in, replicas_of
from jdcore.distributed._sharding import Gathered

# Integers of as many bytes as an entry.
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def words_of(
    tensors: Sequence[Tensor], promised: Collection[Tensor], *, by_numbers: bool = False
) -> list[object]:
    """
    What tells tensors from others on all processes: their places, or the numbers in them.

    What torch neither keeps equal nor divides is a copy where it holds the same numbers.

    :param promised: Those of which the user says that they are copies, in this order, if torch does
        not keep them equal.
    :param by_numbers: Whether copies that torch keeps equal are told by their numbers as well. Of
        their places, a process that has more wrappers than another one may say something else.
    """
    gathered, given = Gathered(), set(promised)
    places = {} if by_numbers else places_in(replicas_of(tensors))
    sharded = [gathered.place(gathered.shard(t)) for t in tensors]
    modules = sorted({place[0] for place in sharded if place is not None})
    order = {module: position for position, module in enumerate(modules)}
    found = [
        places.get(t) or (None if place is None else (order[place[0]], place[1]))
        for t, place in zip(tensors, sharded, strict=True)
    ]
    unknown = [
        t
        for t, place in zip(tensors, found, strict=True)
        if place is None and (t not in given or replicas_of([t]))
    ]
    contents = torch.stack([_contents(t).cpu() for t in unknown]).tolist() if unknown else []
    of_unknown = dict(zip(unknown, contents, strict=True))
    return [
        (place or of_unknown.get(t), tuple(t.shape), t.dtype)
        for t, place in zip(tensors, found, strict=True)
    ]


def _contents(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
    # Sums of integers are the same in any order, also where they overflow: those of floats depend
    # on the device.
    bits = flat.view(_WORDS[flat.itemsize]).long()
    return (bits * torch.arange(1, len(bits) + 1, device=bits.device)).sum()
