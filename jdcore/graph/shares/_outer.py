from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from attrs import evolve, frozen
from torch import Size, Tensor

from jdcore.graph._cost import outer_ghost_beats_direct
from jdcore.graph._memory import pieces
from jdcore.graph.shares._ghost import Gram, add_contracted, linear_gram, summed_up
from jdcore.graph.shares._product import (
    cut,
    outer,
    product,
    scaled,
    sum_of,
    weighted_sum,
    widened,
)
from jdcore.graph.shares._share import Accumulator, Share, apart, check_unmodified

# Entries of gradients from which on to copy them for several layers takes longer than calls.
_COPIED = 1 << 14

# Entries of weights from which on each weighted gradient is computed by itself.
_WIDE = 1 << 17


@frozen(eq=False)
class OneHot:
    """
    Rows of a unit matrix, as a table looked up by index has them for inputs.

    :param index: Which row, shape [B, T].
    :param size: Of how many.
    :param sparse: Whether the gradient of the table is to be sparse.
    """

    index: Tensor
    size: int
    sparse: bool = False


class Outer(Share):
    """
    Sums of outer products over T positions, as matrix products and look-ups have them.

    :param inputs: What the operation saved, shape [B, T, i].
    :param grads: The gradients at its result, shape [K, B, T, o].
    :param grads_first: Whether the operand is [o, i] rather than [i, o].
    :param shape: The shape of the operand, of i times o entries.
    :param bias: The shape of a bias that the Gramian is to hold as well, if there is one: it is the
        weight of one more input, which is 1.
    """

    def __init__(
        self,
        inputs: Tensor | OneHot,
        grads: Tensor,
        *,
        grads_first: bool,
        shape: Sequence[int],
        bias: Size | None = None,
    ) -> None:
        self.inputs, self.grads, self.grads_first = inputs, grads, grads_first
        self.shape, self.bias = torch.Size(shape), bias
        self._writes = self._saved._version

    @property
    def _saved(self) -> Tensor:
        """What is in the hands of the user as well."""
        return self.inputs.index if isinstance(self.inputs, OneHot) else self.inputs

    def __repr__(self) -> str:
        K, B, T, o = self.grads.shape
        looked_up = isinstance(self.inputs, OneHot)
        i = self.inputs.size if isinstance(self.inputs, OneHot) else self.inputs.shape[2]
        return f"Outer({K} x {B} rows, {'one of ' * looked_up}{i} inputs x {o}, T = {T})"

    # -- the Gramian -------------------------------------------------------------------------------

    def add_gramian(self, gramian: Accumulator) -> None:
        if isinstance(self.inputs, OneHot):
            self._add_looked_up(self.inputs, gramian)
            return
        K, B, T, o = self.grads.shape
        # With one position per sample, the matrices of the ghost are no larger than the Gramian.
        if T == 1 or outer_ghost_beats_direct(K, B, T, self.inputs.shape[2], o):
            gram = linear_gram(self.inputs, one_more=self.bias is not None)
            add_contracted(gram, self.grads, gramian)
        else:
            self._add_direct(self.inputs, gramian)

    def _add_direct(self, inputs: Tensor, gramian: Accumulator) -> None:
        K, B, T, _ = self.grads.shape
        room, grads = gramian.memory.read_at_once, self.grads
        # One call for all tasks, which copies the inputs for each.
        if K == 1:
            grads = grads[0]
        for some in cut(grads, max(1, room // max(1, K * B * T)), -1):
            parts = pieces(inputs.shape[2], room // max(1, K * B * max(some.shape[-1], T)))
            for start, stop in parts:
                factor = inputs if len(parts) == 1 else inputs[..., start:stop]
                gramian.add_rows(product(factor.mT, some).reshape(K * B, -1))

    def _add_looked_up(self, inputs: OneHot, gramian: Accumulator) -> None:
        K, B, T, o = self.grads.shape
        R, memory = K * B, gramian.memory
        if T == 1 and memory.entries >= B * B:
            add_contracted(_same(inputs.index), self.grads, gramian)
            return
        # Only rows of the table that are used have gradients; most of a vocabulary has none in a
        # batch.
        used, place = torch.unique(inputs.index, return_inverse=True)
        if R * len(used) < B * T * T or R * len(used) * o <= memory.entries:
            for start, stop in memory.pieces(o, R * len(used)):
                grads = widened(self.grads[..., start:stop])
                rows = grads.new_zeros(R * len(used), stop - start)
                _scatter(rows, place, len(used), grads)
                gramian.add_rows(rows.view(R, -1))
                del rows  # before there are those of the next piece
        else:
            add_contracted(_same(place), self.grads, gramian)

    # -- rows and their sums -----------------------------------------------------------------------

    def weighted(self, weights: Tensor) -> Tensor:
        check_unmodified(self._saved, self._writes)
        inputs, grads = self.inputs, self.grads
        if isinstance(inputs, OneHot):
            return self._looked_up_sum(inputs, weighted_sum(weights, grads).flatten(0, 1))
        if grads.shape[0] == 1 and inputs.shape[2] < grads.shape[3]:
            return self._total(scaled(weights[0], inputs), grads[0])  # the smaller one
        return self._total(inputs, weighted_sum(weights, grads))

    def gradients(self, weights: Tensor) -> list[Tensor]:
        """:meth:`weighted`, and the same of the bias, which has the same gradients [K, B, 1, o]."""
        if self.bias is None:
            return super().gradients(weights)
        assert isinstance(self.inputs, Tensor)  # tables have none
        check_unmodified(self.inputs, self._writes)
        grads = weighted_sum(weights, self.grads)
        return [self._total(self.inputs, grads), grads.sum((0, 1)).view(self.bias)]

    def _total(self, inputs: Tensor, grads: Tensor) -> Tensor:
        """The sum over samples [B, T, i] by [B, T, o], one of them weighted."""
        if grads.stride(0) < grads.stride(1):
            # Positions lie before samples. In which order both are summed up is the same.
            inputs, grads = inputs.transpose(0, 1), grads.transpose(0, 1)
        total = self.summed(inputs.flatten(0, 1), grads.flatten(0, 1))
        return total if total.shape == self.shape else total.reshape(self.shape)

    def summed(self, inputs: Tensor, grads: Tensor) -> Tensor:
        """Outer products [..., N, i] by [..., N, o], summed over N."""
        left, right = (grads, inputs) if self.grads_first else (inputs, grads)
        return product(left.mT, right)

    def _looked_up_sum(self, inputs: OneHot, grads: Tensor) -> Tensor:
        index, size = inputs.index.flatten(), (inputs.size, grads.shape[1])
        if inputs.sparse:
            return torch.sparse_coo_tensor(
                index[None], grads, size, check_invariants=False, device=grads.device
            )
        total = grads.new_zeros(size).index_add_(0, index, grads)
        return (total.T if self.grads_first else total).reshape(self.shape)

    def rows(self) -> Tensor:
        grads = widened(self.grads)
        K, B, _, o = grads.shape
        if isinstance(self.inputs, OneHot):
            rows = grads.new_zeros(K * B * self.inputs.size, o)
            _scatter(rows, self.inputs.index, self.inputs.size, grads)
            rows = rows.view(K, B, -1, o)
        else:
            return outer(self.inputs, grads, grads_first=self.grads_first).view(K, B, *self.shape)
        return (rows.mT if self.grads_first else rows).reshape(K, B, *self.shape)

    # -- samples of several processes --------------------------------------------------------------

    def flat_rows(self) -> Tensor:
        rows = super().flat_rows()
        return rows if self.bias is None else torch.cat([rows, widened(self.grads).sum(2)], 2)

    def factors_of_samples(self) -> list[tuple[Tensor, int]]:
        inputs = self.inputs.index if isinstance(self.inputs, OneHot) else self.inputs
        return [(inputs, 0), (self.grads, 1)]

    def of(self, factors: Sequence[Tensor]) -> Outer:
        inputs, grads = factors
        return Outer(
            evolve(self.inputs, index=inputs) if isinstance(self.inputs, OneHot) else inputs,
            grads,
            grads_first=self.grads_first,
            shape=self.shape,
            bias=self.bias,
        )

    @property
    def setting(self) -> tuple[Hashable, ...]:
        inputs = self.inputs
        table = (inputs.size, inputs.sparse) if isinstance(inputs, OneHot) else None
        return self.grads_first, self.bias is None, table

    # -- several uses of one operand ---------------------------------------------------------------

    def squares(self) -> Tensor:
        """The squared length of each row if no position cancelled another one, float64 [K B]."""
        lengths = self.grads.norm(dim=3).double()
        if isinstance(self.inputs, Tensor):
            lengths = lengths * self.inputs.norm(dim=2)
        squares: Tensor = lengths.sum(2).square().flatten()
        return squares

    def turned(self) -> Outer:
        """The share of the transposed operand."""
        return Outer(
            self.inputs,
            self.grads,
            grads_first=not self.grads_first,
            shape=(self.shape[1], self.shape[0]),
            bias=self.bias,
        )

    @property
    def factors(self) -> tuple[Tensor | OneHot, Tensor | OneHot]:
        """What the first and what the second dimension of the operand comes from."""
        return (self.grads, self.inputs) if self.grads_first else (self.inputs, self.grads)


class Uses(Share):
    """
    The sum of several shares of one and the same operand.

    :param shares: Those of different kinds, see :func:`joined`.
    """

    def __init__(self, shares: Sequence[Outer]) -> None:
        self._shares, self.shape = shares, shares[0].shape

    def add_gramian(self, gramian: Accumulator) -> None:
        for i, share in enumerate(self._shares):
            gramian.note(share.squares())
            share.add_gramian(gramian)
            for other in self._shares[i + 1 :]:
                _add_between(share, other, gramian)

    def rows(self) -> Tensor:
        return sum_of(share.rows() for share in self._shares)

    def factors_of_samples(self) -> list[tuple[Tensor, int]]:
        return [factor for share in self._shares for factor in share.factors_of_samples()]

    def of(self, factors: Sequence[Tensor]) -> Uses:
        pairs = zip(factors[::2], factors[1::2], strict=True)
        return Uses([share.of(pair) for share, pair in zip(self._shares, pairs, strict=True)])

    @property
    def setting(self) -> tuple[Hashable, ...]:
        return tuple(share.setting for share in self._shares)


def joined(shares: Sequence[Outer]) -> Outer | Uses:
    """The sum of shares of one and the same operand, which has several uses."""
    kinds: dict[Hashable, list[Outer]] = {}
    for share in shares:
        kind = isinstance(share.inputs, OneHot), share.grads_first
        kinds.setdefault(kind, []).append(share)
    found = [
        of_kind[0] if len(of_kind) == 1 else _lengthened(of_kind) for of_kind in kinds.values()
    ]
    return found[0] if len(found) == 1 else Uses(found)


def _lengthened(shares: Sequence[Outer]) -> Outer:
    # A sum over positions does not mind where they come from: the uses are positions of one share.
    inputs, grads = zip(*(share.factors_of_samples() for share in shares), strict=True)
    return shares[0].of([torch.cat([i for i, _ in inputs], 1), torch.cat([g for g, _ in grads], 2)])


def _same(index: Tensor) -> Gram:
    """The Gram matrix of one-hot inputs."""

    def gram(start: int, stop: int) -> Tensor:
        rows, columns = index[start:stop].reshape(-1), index[:stop].reshape(-1)
        return (rows[:, None] == columns).float()

    return gram


def _scatter(rows: Tensor, place: Tensor, length: int, grads: Tensor) -> None:
    K, B, T, _ = grads.shape
    offset = torch.arange(K * B, device=grads.device).view(K, B, 1) * length
    rows.index_add_(0, (offset + place).reshape(-1), grads.reshape(K * B * T, -1))


def _add_between(u: Outer, v: Outer, gramian: Accumulator) -> None:
    """Add the inner products of the rows of one share and those of another, both ways."""
    K, B, Tu, _ = u.grads.shape
    m, Tv = K * B, v.grads.shape[2]
    total = u.grads.new_zeros(m, m, dtype=torch.float64)
    for part in [slice(*piece) for piece in gramian.memory.pieces(m, Tu * m * Tv)]:
        first, second = (_inner(a, b, part, K) for a, b in zip(u.factors, v.factors, strict=True))
        block = (first * second).view(part.stop - part.start, Tu, m, Tv)
        total[part] = block.sum((1, 3), dtype=torch.float64)
    gramian.add(total.add_(total.T.clone()))


def _inner(a: Tensor | OneHot, b: Tensor | OneHot, part: slice, K: int) -> Tensor:
    """Inner products of one factor of some of the rows with one of all rows: [n Tu, m Tv]."""
    if isinstance(a, OneHot):
        index = _by_row(a.index, K)[part].flatten()
        return widened(_by_row(b, K).flatten(0, 1).index_select(1, index).T)  # type: ignore[arg-type]
    if isinstance(b, OneHot):
        index = _by_row(b.index, K).flatten()
        return widened(_by_row(a, K)[part].flatten(0, 1).index_select(1, index))
    return product(_by_row(a, K)[part].flatten(0, 1), _by_row(b, K).flatten(0, 1).T)


def _by_row(factor: Tensor, K: int) -> Tensor:
    """[K B, T, ...] from gradients [K, B, T, o], or from what all tasks share, [B, T, ...]."""
    if factor.ndim == 4:
        return factor.flatten(0, 1)
    return factor if K == 1 else factor.expand(K, *factor.shape).flatten(0, 1)


# -- several layers --------------------------------------------------------------------------------


class OuterLayers:
    """
    What the weights of several layers of one form contribute to the Jacobian, for one task.

    They are computed together where the launch of a small operation takes longer than the
    operation, above all on accelerators.

    :param share: With the layers in the place of tasks, and the inputs ``[n, B, T, i]`` of each.
    :param joined: Entries of weighted gradients that may be computed together.
    """

    def __init__(self, share: Outer, joined: int) -> None:
        assert isinstance(share.inputs, Tensor)  # tables are served one by one
        self._inputs, self._share, self._joined = share.inputs, share, joined

    def add_gramian(self, gramian: Accumulator) -> None:
        """Add the Gramian of the rows of all layers."""
        inputs, grads = self._inputs, self._share.grads
        n, B, T, o = grads.shape
        i, ghost = inputs.shape[3], T == 1
        ghost = ghost or outer_ghost_beats_direct(1, B, T, i, o)
        # Of each layer there are matrices of positions, or rows twice.
        size = (B * T) ** 2 if ghost else B * i * o
        parts = pieces(n, gramian.memory.joined // (2 * size))
        for start, stop in parts:
            some = slice(start, stop) if len(parts) > 1 else ...
            if ghost:
                self._add_ghosts(inputs[some], grads[some], gramian)
            else:
                self._add_rows(inputs[some], grads[some], gramian)

    def _add_ghosts(self, inputs: Tensor, grads: Tensor, gramian: Accumulator) -> None:
        """By Gram matrices over positions."""
        T = grads.shape[2]
        inputs, grads = inputs.flatten(1, 2), grads.flatten(1, 2)
        gram = product(inputs, inputs.mT)
        if self._share.bias is not None:
            gram += 1.0
        found = product(grads, grads.mT).mul_(gram)
        gramian.pend(summed_up(found, T, gramian) if T > 1 else found)

    def _add_rows(self, inputs: Tensor, grads: Tensor, gramian: Accumulator) -> None:
        """By rows, those of several layers one behind the other."""
        n, B = grads.shape[:2]
        rows = product(inputs.flatten(0, 1).mT, grads.flatten(0, 1)).view(n, B, -1)
        gramian.add_rows(rows.transpose(0, 1).flatten(1))

    def gradients(self, weights: Tensor) -> list[Tensor]:
        """The weighted gradients of all weights, and behind them those of all biases."""
        inputs, grads, shape = self._inputs, self._share.grads, self._share.shape
        views: list[Tensor] = []
        if self._share.bias is not None:
            biases = product(weights.expand(grads.shape[0], *weights.shape), grads.flatten(1, 2))
            views += biases.view(-1, *self._share.bias).unbind()
        # The same scale for all of them, of the smaller factor.
        if inputs.shape[3] < grads.shape[3]:
            inputs = scaled(weights, inputs)
        else:
            grads = scaled(weights, grads)
        inputs, grads = inputs.flatten(1, 2), grads.flatten(1, 2)
        own: list[Tensor] = []
        if shape.numel() > _WIDE or len(inputs) * shape.numel() > self._joined:
            pairs = zip(inputs, grads, strict=True)
            own = [self._share.summed(*of_layer).view(shape) for of_layer in pairs]
        else:
            views[:0] = self._share.summed(inputs, grads).view(-1, *shape).unbind()
        return own + apart(views, [view.shape for view in views])


class OuterBeside:
    """
    What the weights of several layers of the same inputs contribute to the Jacobian.

    They are one layer with the outputs of all: its Gramian takes the products of the inputs once.

    :param shares: Of one :func:`beside`.
    """

    def __init__(self, shares: Sequence[Outer]) -> None:
        first, *_ = self._shares = shares
        self._outputs = [share.grads.shape[3] for share in shares]
        self._whole = Outer(
            first.inputs,
            torch.cat([share.grads for share in shares], 3),
            grads_first=first.grads_first,
            shape=(sum(self._outputs), -1) if first.grads_first else (-1, sum(self._outputs)),
            bias=None if first.bias is None else Size([sum(self._outputs)]),
        )

    def add_gramian(self, gramian: Accumulator) -> None:
        """Add the Gramian of the rows of all layers."""
        self._whole.add_gramian(gramian)

    def gradients(self, weights: Tensor) -> list[Tensor]:
        """The weighted gradients of all weights, and behind them those of all biases."""
        total, *bias = self._whole.gradients(weights)
        views = [*torch.split(total, self._outputs, 0 if self._whole.grads_first else 1)]
        views += [part for of_all in bias for part in torch.split(of_all, self._outputs)]
        shapes = [share.shape for share in self._shares]
        return apart(views, shapes + [s.bias for s in self._shares if s.bias is not None])


def beside(share: Outer) -> Hashable:
    """
    What shares have in common that are those of one layer with the outputs of all.

    :returns: None if it is faster by itself.
    """
    inputs, grads = share.inputs, share.grads
    if isinstance(inputs, OneHot) or grads.numel() > _COPIED:
        return None
    # What lies in the same place, while both are there, is the same, unless one of them is read as
    # the negative of what lies there, as the imaginary parts of conjugates are.
    place = inputs.data_ptr(), inputs.shape, inputs.stride(), inputs.dtype, inputs.device
    read = place, inputs.is_neg()
    return read, grads.shape[2], grads.dtype, share.grads_first, share.bias is None
