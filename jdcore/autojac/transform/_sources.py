from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from jdcore.autojac.transform._base import Transform, Values, describe_keys
from jdcore.errors import ParameterError


class Init(Transform):
    """
    Where a differentiation starts: the derivative of the tensors that are differentiated.

    :param tensors: The tensors to be differentiated. Needs no key and gives these.
    :param values: What to start with, one value per tensor: a gradient (shape of the tensor) or a
        Jacobian (with the rows as additional first dimension). Ones by default.
    """

    def __init__(self, tensors: Iterable[Tensor], values: Sequence[Tensor] | None = None) -> None:
        super().__init__(needs=(), gives=tensors)
        if values is not None and len(values) != len(self.gives):
            raise ParameterError("values", f"{len(self.gives)} tensors, one each", len(values))
        self._values = values

    def apply(self, values: dict[Tensor, Tensor], /) -> Values:
        del values
        if self._values is None:
            kinds = {(key.ndim, key.dtype, key.device) for key in self.gives}
            if len(kinds) == 1:
                [(ndim, dtype, device)] = kinds
                if ndim == 0:  # as usual: one call for all losses
                    ones = torch.ones(len(self.gives), dtype=dtype, device=device)
                    return dict(zip(self.gives, ones.unbind(), strict=True))
            return {key: torch.ones_like(key.detach()) for key in self.gives}
        pairs = zip(self.gives, self._values, strict=True)
        return {key: value.detach().to(key.dtype) for key, value in pairs}

    def __repr__(self) -> str:
        return f"Init({describe_keys(self.gives)})"


class Keep(Transform):
    """
    Pass values on unchanged, beside another transform in a union.

    :param keys: Keys needed and given.
    """

    def __init__(self, keys: Iterable[Tensor]) -> None:
        kept = tuple(keys)
        super().__init__(needs=kept, gives=kept)

    def apply(self, values: dict[Tensor, Tensor], /) -> Values:
        return values

    def __repr__(self) -> str:
        return f"Keep({describe_keys(self.gives)})"


class Diagonalize(Transform):
    """
    Make every element of the tensors an objective of its own.

    Gradients of shapes S1, S2, ... with m elements in all become the blocks ``[m, *S1]``,
    ``[m, *S2]``, ... of a diagonal matrix: row i holds the i-th element and zeros.

    :param keys: Keys needed and given; their order is the order of the rows.
    """

    def __init__(self, keys: Iterable[Tensor]) -> None:
        diagonalized = tuple(keys)
        super().__init__(needs=diagonalized, gives=diagonalized)

    def apply(self, values: dict[Tensor, Tensor], /) -> Values:
        kinds = {(value.ndim, value.dtype, value.device) for value in values.values()}
        if len(kinds) == 1 and next(iter(kinds))[0] == 0:
            # As many scalars as rows: the general way would take five operators for each.
            scalars = torch.diag(torch.stack(list(values.values())))
            return dict(zip(values, scalars.unbind(1), strict=True))
        m = sum(value.numel() for value in values.values())
        blocks = {}
        start = 0
        for key, value in values.items():
            n = value.numel()
            block = value.new_zeros((m, n))
            block[start : start + n].diagonal().copy_(value.flatten())
            blocks[key] = block.view(m, *value.shape)
            start += n
        return blocks

    def __repr__(self) -> str:
        return f"Diagonalize({describe_keys(self.gives)})"
