from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from jdcore.errors import UnservedGraphError
from jdcore.graph._memory import Memory, pieces
from jdcore.graph.shares._product import (
    HALVES,
    columns_at_once,
    combined,
    cut,
    product,
    sum_over,
    widened,
)
from jdcore.linalg._combine import sent

# Products of fewer rows are slow.
_ROWS = 128

# Sums over positions of products of float32 are as precise as rows are where they are no smaller a
# part than this of what they would be if no position cancelled another one.
_LEFT = 0.05

# Entries of Gramians that wait to be added: 4 MB in float32, and as much once they are joined. On a
# CPU, few enough to stay in its cache.
_PENDING, _PENDING_HERE = 1 << 20, 1 << 16

_OURS = "jdcore."


def check_unmodified(saved: Tensor, writes: int) -> None:
    """
    Check that nobody wrote into what an operation saved since the Gramian was made of it.

    As torch does for each backward pass, of which the weighted gradients need none here.

    :param writes: How often somebody had written into it by then.
    :raises UnservedGraphError: If somebody did.
    """
    if saved._version != writes:
        raise UnservedGraphError(
            "an operand that was modified in place while the losses were weighed",
            "the Gramian is that of what was there before",
            "Write into inputs and parameters after the step.",
        )


class Share(ABC):
    """
    What one operation contributes to the Jacobian with respect to one of its operands.

    The operand belongs to all samples, so there is one row of its shape for each task k and each
    sample b, in the order ``k * B + b``; R = K * B.
    """

    shape: torch.Size
    """The shape of the operand."""

    def add_gramian(self, gramian: Accumulator) -> None:
        """Add the Gramian of the rows."""
        gramian.add_rows(self.flat_rows().flatten(0, 1))

    def weighted(self, weights: Tensor) -> Tensor:
        """
        ``sum_kb weights[k, b] J_kb``, in the shape of the operand.

        :param weights: Shape [K, B], in float64 where it is to be summed in float64.
        """
        return combined(weights.reshape(-1), self.flat_rows().flatten(0, 1)).view(self.shape)

    def gradients(self, weights: Tensor) -> list[Tensor]:
        """:meth:`weighted`, in memory of its own."""
        found = self.weighted(weights)
        # Those of third parties may hand out what they keep, which must not become a `.grad`.
        return [found if type(self).__module__.startswith(_OURS) else found.clone()]

    @abstractmethod
    def rows(self) -> Tensor:
        """All rows written out, in at least float32, shape ``[K, B, *shape]``."""

    # -- samples of several processes --------------------------------------------------------------

    def flat_rows(self) -> Tensor:
        """Rows [K, B, n] whose Gramian is what :meth:`add_gramian` adds."""
        rows = self.rows()
        return rows.reshape(*rows.shape[:2], self.shape.numel())

    def factors_of_samples(self) -> list[tuple[Tensor, int]] | None:
        """
        What the share is made of, with the dimension of samples of each; None if of rows alone.

        With :meth:`of`, samples of several processes are brought together.
        """
        return None

    def of(self, factors: Sequence[Tensor]) -> Share:
        """The same with other samples: factors in place of those that it is made of."""
        raise NotImplementedError

    @property
    def setting(self) -> tuple[Hashable, ...]:
        """What :meth:`of` keeps: only shares that agree in it may be brought together."""
        return ()


class Dense(Share):
    """
    Rows written out.

    :param rows: Shape ``[K, B, *shape]``, or with any other dimensions behind B of as many entries.
    :param shape: The shape of the operand.
    """

    def __init__(self, rows: Tensor, shape: Sequence[int]) -> None:
        self._rows, self.shape = rows, torch.Size(shape)

    def __repr__(self) -> str:
        K, B = self._rows.shape[:2]
        return f"Dense({K} x {B} rows of {list(self.shape)})"

    @classmethod
    def summed(cls, terms: Tensor, shape: Sequence[int]) -> Dense:
        """Rows that are sums of terms ``[K, B, T, *shape]`` over positions."""
        return cls(sum_over(terms, [2]) if terms.shape[2] > 1 else terms, shape)

    def flat_rows(self) -> Tensor:
        rows = widened(self._rows)
        return rows if rows.ndim == 3 else rows.reshape(*rows.shape[:2], self.shape.numel())

    def rows(self) -> Tensor:
        rows = widened(self._rows)
        return rows.reshape(*rows.shape[:2], *self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """That of the rows as they are multiplied."""
        return torch.float32 if self._rows.dtype in HALVES else self._rows.dtype


class ShortRows(Dense):
    """
    Short rows of several operands side by side, multiplied together.

    :param parts: Rows [K, B, n] each.
    :param shapes: The shapes of the operands, one behind the other.
    """

    def __init__(self, parts: list[Tensor], shapes: Sequence[torch.Size]) -> None:
        joined = torch.cat(parts, 2) if len(parts) > 1 else parts[0]
        super().__init__(joined, joined.shape[2:])
        self._shapes = shapes

    def gradients(self, weights: Tensor) -> list[Tensor]:
        """The weighted gradients of all operands."""
        sizes = [shape.numel() for shape in self._shapes]
        return apart(torch.split(self.weighted(weights), sizes), self._shapes)


def apart(views: list[Tensor] | tuple[Tensor, ...], shapes: Sequence[torch.Size]) -> list[Tensor]:
    """
    Parts of a tensor in memory of their own, by one call: to keep one of them must not keep all.

    :param shapes: Those that they are to have.
    """
    own = torch._foreach_mul(views, 1.0) if len(views) > 1 else views
    # Most of them are biases, and each view costs a call.
    pairs = zip(own, shapes, strict=True)
    return [part if part.shape == shape else part.reshape(shape) for part, shape in pairs]


class SingleRows:
    """
    Rows of operands that one loss alone depends on, as on the parameters of its own head.

    :param rows: Of each operand, in its shape.
    :param losses: The loss of each.
    """

    def __init__(self, rows: list[Tensor], losses: Sequence[int]) -> None:
        self._rows, self._losses = rows, losses

    def add_gramian(self, gramian: Accumulator) -> None:
        """Add their squares to the diagonal, as they are orthogonal to all others."""
        largest = max(1, gramian.memory.read_at_once // 4)  # each is copied to float64
        parts: list[Tensor] = []
        losses: list[int] = []
        for row, loss in zip(self._rows, self._losses, strict=True):
            of_row = [row] if row.numel() <= largest else cut(row.flatten(), largest, 0)
            parts += of_row
            losses += [loss] * len(of_row)
        lengths = torch._foreach_norm(parts, 2, torch.float64)
        of_loss: dict[int, list[Tensor]] = {}
        for loss, length in zip(losses, lengths, strict=True):
            of_loss.setdefault(loss, []).append(length)
        alike: dict[int, list[int]] = {}
        for loss, own in of_loss.items():
            alike.setdefault(len(own), []).append(loss)
        # In sums of a fixed order, whatever the device.
        for count, group in alike.items():
            stacked = torch.stack([length for loss in group for length in of_loss[loss]])
            gramian.add_squares(stacked.view(-1, count).square().sum(1), group)

    def gradients(self, weights: Tensor) -> list[Tensor]:
        """The weighted gradients of all operands."""
        of_loss = weights.flatten().unbind()
        return [*torch._foreach_mul(self._rows, [of_loss[loss] for loss in self._losses])]


class Addend(Protocol):
    """What has a Gramian: a share, or several of them at once."""

    def add_gramian(self, gramian: Accumulator) -> None:
        """Add it, float64 [R, R], to those of others."""

    def gradients(self, weights: Tensor) -> list[Tensor]:
        """
        The weighted gradients of all operands, each in memory of its own.

        :param weights: As for :meth:`Share.weighted`.
        """


class Accumulator:
    """
    The Gramian while it grows: a float64 matrix [R, R] to which every share adds.

    It is symmetric, so only what is added to the lower triangle counts.

    :param rows: Number R of objectives. Row ``k * B + b`` belongs to task k and sample b.
    :param keep: Whether the shares will be asked for a weighted gradient afterwards, so that rows
        they had to compute may be worth keeping.
    :param memory: How temporaries are made.
    """

    def __init__(self, rows: int, device: torch.device, keep: bool, memory: Memory) -> None:
        self._found: Tensor | None = None
        self._device = device
        self.rows = rows
        self.keep = keep
        self.memory = memory
        self.joins = True
        """Whether the shares of several layers may come as one."""
        self._pending: dict[torch.dtype, list[Tensor]] = {}
        self._most_pending = _PENDING_HERE if memory.cached else _PENDING
        self._entries_pending = 0
        self._squares: dict[tuple[int, int], list[Tensor]] = {}
        self.added: list[Addend] = []
        """The shares that were added, if they are kept."""

    @property
    def _lower(self) -> Tensor:
        if self._found is None:
            self._found = torch.zeros(
                self.rows, self.rows, dtype=torch.float64, device=self._device
            )
        return self._found

    def note(self, squares: Tensor, first: int = 0) -> None:
        """
        Say what products over positions were summed up to the diagonal, as if none had cancelled.

        :param squares: Of some rows: the products of each position with itself, shape [n].
        :param first: The first of these rows.
        """
        # Added up at last, those of the same rows together: on accelerators each addition is a
        # kernel.
        self._squares.setdefault((first, squares.shape[0]), []).append(squares)

    def result(self) -> tuple[Tensor, bool]:
        """
        The Gramian, exactly symmetric, and whether products of float32 are too coarse for it.

        They are if little is left of what was summed. Positions may cancel where rows do not: those
        of a gradient that is summed over them, such as that of a task near its own minimum, or two
        uses of a layer.
        """
        self._add_pending()
        # A transposed copy is faster than adding what lies transposed.
        upper = self._lower.T.clone(memory_format=torch.contiguous_format).triu_(1)
        total = upper.add_(self._lower.tril_())
        if not self._squares:
            return total, False
        # What is left of the square of a row whose positions cancel is rounding of either sign.
        squares, summed = total.diagonal().clamp_(min=0.0), total.new_zeros(self.rows)
        for (first, count), noted in self._squares.items():
            summed[first : first + count] += torch.stack(noted).sum(0)
        return total, bool((squares < _LEFT * summed).any())

    def add_share(self, share: Addend) -> None:
        """Add the Gramian of a share."""
        if self.keep:
            self.added.append(share)
        share.add_gramian(self)

    def add(self, product: Tensor, first: int = 0) -> None:
        """
        Add some rows of a Gramian, of any floating dtype.

        :param product: Shape [n, c], where c reaches the diagonal at least.
        :param first: The first of the n rows.
        """
        n, c = product.shape
        if n < self.rows:
            self._lower[first : first + n, :c] += product
        else:
            self.pend(product[None])

    def add_squares(self, squares: Tensor, losses: Sequence[int]) -> None:
        """Add to the diagonal, float64, at single losses."""
        index = sent(torch.tensor(losses, device="cpu"), squares.device)
        self._lower.diagonal().index_add_(0, index, squares)

    def pend(self, products: Tensor) -> None:
        """Add Gramians [n, R, R], small ones later and all at once: each addition is a kernel."""
        if products.numel() >= self._most_pending // 4:
            alone = len(products) == 1
            self._lower.add_(products[0] if alone else products.sum(0, dtype=torch.float64))
            return
        self._pending.setdefault(products.dtype, []).append(products)
        self._entries_pending += products.numel()
        if self._entries_pending > self._most_pending:
            self._add_pending()

    def _add_pending(self) -> None:
        for same in self._pending.values():
            joined = torch.cat(same) if len(same) > 1 else same[0]
            summed = joined.sum(0, dtype=torch.float64)
            self._found = summed if self._found is None else self._found.add_(summed)
        self._pending.clear()
        self._entries_pending = 0

    def add_rows(self, rows: Tensor) -> None:
        """Add the Gramian of rows [R, n]."""
        width, (R, length) = columns_at_once(rows), rows.shape
        if length > (most := max(1, self.memory.entries // max(1, R))):
            for columns in cut(rows, most, 1):  # products in float64 copy them
                self.add_rows(columns)
            return
        if length > 2 * width:
            count = length // width
            rows = rows if rows.stride(1) == 1 else rows.contiguous()
            pieces = rows.as_strided((count, R, width), (width, rows.stride(0), 1))
            self.pend(product(pieces, pieces.mT))
            if count * width == length:
                return
            rows = rows[:, count * width :]
        parts = self.halves()
        for columns in cut(rows, width, 1):
            for start, stop in parts:
                self.add(lower_product(columns, start, stop), start)

    def halves(self) -> Sequence[tuple[int, int]]:
        """Pieces of the rows of a symmetric product, few of which cost little more than a half."""
        rows = self.rows
        if rows <= _ROWS or not self.memory.cached:
            return [(0, rows)]
        return pieces(rows, max(_ROWS, -(-rows // 8)))


def lower_product(rows: Tensor, start: int, stop: int) -> Tensor:
    """Rows start to stop of ``rows @ rows.T``, up to their last entry on the diagonal."""
    if stop - start == rows.shape[0]:
        return product(rows, rows.T)
    earlier = rows[:stop]
    return product(earlier[start:], earlier.T)
