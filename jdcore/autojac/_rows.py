from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set

import torch
from torch import Tensor

from jdcore._fields import as_grad, check_fits, dense
from jdcore.autojac._products import Product
from jdcore.linalg._pages import new_tensor, new_tensors


class Rows:
    """
    Jacobians ``[m, *S]`` that passes write a piece of some rows at a time, and sums of gradients.

    Rows that no pass writes are zero.

    :param inputs: What the passes differentiate with respect to.
    :param sums: How many of them, the last ones, have a sum in place of a Jacobian.
    :param m: Number of rows.
    :param size: How many of them a piece has.
    :param products: Inputs, by position, of which passes return the gradient at a product.
    """

    def __init__(
        self,
        inputs: Sequence[Tensor],
        sums: int,
        m: int,
        size: int,
        products: Mapping[int, Product],
    ) -> None:
        self._inputs, self._m, self._size, self._products = inputs, m, size, products
        self._results = new_tensors(inputs[: len(inputs) - sums], m)
        self._sums: dict[int, Tensor] = {}
        self._views: list[Sequence[Tensor]] = [()] * len(self._results)
        # Per Jacobian, the number of the piece that follows the last one that was written.
        self._next = [0] * len(self._results)
        self._zero: list[Tensor] = []

    def place(self, i: int, k: int) -> Tensor:
        """Where the k-th piece of a Jacobian is to be written; they come in their order."""
        result, size, after = self._results[i], self._size, self._next[i]
        self._next[i] = k + 1
        if k == 0:
            # Most get all their rows. All views at once take one call, not one for each row.
            self._views[i] = result.unbind() if size == 1 else torch.split(result, size)
        elif after < k:
            self._zero.append(result[after * size : k * size])
        if self._views[i]:
            return self._views[i][k]
        # Parameters of heads get few rows.
        return result[k] if size == 1 else result[k * size : (k + 1) * size]

    def write(
        self,
        k: int,
        numbers: Iterable[int],
        gradients: Iterable[Tensor | None],
        taken: Set[int],
    ) -> None:
        """
        Write the k-th piece of what some inputs have, or add to it.

        :param numbers: The positions of the inputs.
        :param gradients: What a pass returned for them.
        :param taken: Those that have been written already.
        """
        places: list[Tensor] = []
        values: list[Tensor] = []
        views, following, count = self._views, self._next, len(self._results)
        # Without a call of Python for each of them: there may be hundreds, for each row.
        for i, gradient in zip(numbers, gradients, strict=True):
            if gradient is None or i in taken:
                continue
            if i in self._products:
                self._products[i].write_row(self.place(i, k), gradient)
                continue
            if type(gradient) is not Tensor or gradient.layout is not torch.strided:
                gradient = dense(gradient)
            if i >= count:
                self._add(i, gradient)
            else:
                if views[i] and following[i] == k:
                    place = views[i][k]
                    following[i] = k + 1
                else:
                    place = self._first_place(i, k, gradient)
                places.append(place)
                values.append(gradient)
        if places:
            # One call, and on accelerators few kernels, for all of them.
            torch._foreach_copy_(places, values)

    def _first_place(self, i: int, k: int, gradient: Tensor) -> Tensor:
        """Where the first gradient of an input, or one that follows a gap, is to be written."""
        self._check(i, gradient.shape if self._size == 1 else gradient.shape[1:])
        return self.place(i, k)

    def _add(self, i: int, gradient: Tensor) -> None:
        if i in self._sums:
            self._sums[i].add_(gradient)
            return
        self._check(i, gradient.shape)
        # Laid out as its `.grad` will be, which then takes no memory any more.
        made = as_grad(self._inputs[i], gradient)
        # A copy, as a gradient may lie in the memory of another one (as those of a + b do), of what
        # it was computed from, or of a hook that hands out one buffer again and again.
        self._sums[i] = gradient.clone() if made is gradient else made

    def _check(self, i: int, shape: torch.Size) -> None:
        if shape != self._inputs[i].shape:  # later ones have the same
            check_fits(shape, self._inputs[i])

    def finished(self) -> list[Tensor]:
        """The Jacobians, then the sums."""
        for result, after in zip(self._results, self._next, strict=True):
            if after * self._size < self._m:
                self._zero.append(result[after * self._size :])
        if self._zero:
            torch._foreach_zero_(self._zero)
        added = range(len(self._results), len(self._inputs))
        return self._results + [self._sums[i] if i in self._sums else self._none(i) for i in added]

    def _none(self, i: int) -> Tensor:
        return new_tensor(self._inputs[i], *self._inputs[i].shape).zero_()
