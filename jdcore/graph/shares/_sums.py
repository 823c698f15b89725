from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from jdcore.graph.shares._product import sum_over
from jdcore.graph.shares._share import Dense


def as_they_are(grads: Tensor) -> Tensor:
    """The gradients themselves, as biases have them."""
    return grads


class Sums(Dense):
    """
    Rows that are sums over T positions, made when they are asked for.

    :param make: Makes of the parts what is summed, entry by entry, in any order of dimensions that
        the parts have in common.
    :param parts: The gradients, shape ``[K, B, T, *shape]``, and what they are multiplied by, shape
        ``[B, T, ...]`` each.
    :param shape: The shape of the operand.
    """

    def __init__(
        self, make: Callable[..., Tensor], parts: Sequence[Tensor], shape: torch.Size
    ) -> None:
        self._make, self._parts, self.shape = make, parts, shape
        self._sizes = parts[0].shape[:3]
        self._found: Tensor | None = None

    def __repr__(self) -> str:
        K, B, T = self._sizes
        return f"Sums({K} x {B} rows of {list(self.shape)}, T = {T})"

    def _written(self) -> Tensor:
        if self._found is None:
            terms = self._make(*self._parts)
            self._found = sum_over(terms, [2]) if terms.shape[2] > 1 else terms
            self._parts = ()
        return self._found

    @property
    def kind(self) -> Hashable | None:
        """What others have to agree in to be made together with this one, if any may."""
        if self._sizes[0] > 1 or self._found is not None:
            return None
        # The other parts have the shapes that belong to the gradients.
        return (self._make, self._sizes, self.shape, *[part.dtype for part in self._parts])

    @property
    def entries(self) -> int:
        return sum([part.numel() for part in self._parts])

    @staticmethod
    def rows_together(shares: Sequence[Sums]) -> Tensor:
        """The rows of shares of one kind, one behind the other, shape [1, B, n]."""
        if len(shares) == 1:
            return shares[0].flat_rows()
        grads, *others = zip(*(share._parts for share in shares), strict=True)
        # Layers lie behind samples, in the place of samples behind tasks.
        parts = [torch.stack(grads, 2)[0], *(torch.stack(of_layers, 1) for of_layers in others)]
        return sum_over(shares[0]._make(*parts), [2]).flatten(1)[None]
