"""
Block principal pivoting: the one loop that finds which entries of a solution are positive.

For a linear complementarity problem (LCP), find z >= 0 with ``y = C z + q >= 0`` and ``zᵀ y = 0``.
If F is the set of positive entries, ``C_FF z_F = -q_F`` gives their values; where these or the y
outside F are negative, F is wrong there, and is exchanged (Júdice and Pires). Of two rows that are
nearly equal or opposite, one is exchanged at a time, as it decides what is right for the other.
Where exchanges no longer help, the row is left. All right-hand sides go together. Everything is a
Tensor, on any device; the host asks for two numbers per row and round.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from typing import Any

import numpy as np
import torch
from attrs import frozen
from numpy.typing import NDArray
from torch import Tensor

from jdcore.linalg._blas import factorize, one_thread, product, solve

EPS = 2.0**-52
# Exchanges of small problems. What takes more is left to others.
_ROUNDS = 6
_FEW = 88  # rows up to which a few exchanges in numpy save calls
# Entries of the matrices of which blocks are factorised at once by that.
_BATCH = 1 << 17
_MASKED = 32  # up to this size, gathering the block of a set costs more than it saves
# Exchanges that may fail to reduce the number of wrong entries.
_CREDIT = 8
# Cosine from which on two rows are nearly equal or opposite.
_PAIR = 0.999
# Exchanges that are worth it halve the number of wrong entries in so many rounds.
_HALVED = 3
_REFINEMENTS = 2
_SLIGHT = 1e-8  # an entry of z that is negative by so little is zero in the solution
# Entries of the blocks that are factorised at once: caches of CPUs are small, and an accelerator
# wants few calls.
_ENTRIES, _ENTRIES_ELSEWHERE = 1 << 16, 1 << 26

_INVERSE = 3.0  # factorisations of a matrix that take as long as its inverse
# Square of the smallest pivot from which a matrix can be inverted, and of those below each of which
# answers by the inverse take one more step of refinement, without which signs are noise.
_DEPENDENT, _CORRECTED = 1e-12, (1e-2, 1e-9)

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
_Solver = Callable[[Floats], Floats]


def natural_residual(C: Tensor, Q: Tensor, Z: Tensor) -> Tensor:
    """``max |min(z, C z + q)|`` relative to ``1 + max z`` for every row, [k]; 0 if solved."""
    return _residual(Z, torch.addmm(Q, Z, C))


def _residual(Z: Tensor, Y: Tensor) -> Tensor:
    return torch.minimum(Z, Y).abs_().amax(1) / (1.0 + Z.amax(1))


def pivot(
    C: Tensor,
    Q: Tensor,
    passive: Tensor,
    *,
    delta: float = 0.0,
    centre: Tensor | None = None,
    rounds: int = 30,
) -> tuple[Tensor, Tensor]:
    """
    Solve the LCPs of C and the rows of Q, as far as exchanges find the positive entries.

    With a proximal term, the sets are those of ``C + delta I`` and ``q - delta centre``, which is
    well-posed even where C is singular; steps of refinement then lead towards the solution without.

    :param C: Positive semi-definite matrix [m, m] with a diagonal of order one, float64.
    :param Q: Vectors q, one problem per row [k, m], float64.
    :param passive: Where z is thought to be positive, bool [k, m]. Replaced by the sets found.
    :param delta: The proximal term. 0 where C is positive definite.
    :param centre: Where z is thought to be [k, m]; None for zero.
    :param rounds: Number of factorisations of a set, at most. Rows of which too many entries stay
        wrong are left earlier.
    :returns: z >= 0 [k, m], and how well it solves the problem: the :func:`natural_residual` [k],
        which is NaN where a block was singular.
    """
    b = -Q if centre is None else torch.sub(centre * delta, Q)
    if C.is_cpu and len(Q) and len(C) <= (_MASKED if delta else _FEW):
        c, q, rhs, sets = C.numpy(), Q.numpy(), b.numpy(), passive.numpy()
        with suppress(np.linalg.LinAlgError):
            Z = torch.from_numpy(exchange_few(c, q, rhs, sets, delta))
            residuals = natural_residual(C, Q, Z)
            if bool((residuals <= _tolerance(len(C))).all()):
                return Z, residuals
    return _Exchange(C, Q, b, passive, delta).run(rounds)


def misplaced(
    C: Tensor, Q: Tensor, passive: Tensor, *, delta: float = 0.0, centre: Tensor
) -> Tensor:
    """Numbers of entries [k] that the first exchange of :func:`pivot` would take to be wrong."""
    exchange = _Exchange(C, Q, torch.sub(centre * delta, Q), passive, delta)
    factors = PassiveSets(C, delta).factors(passive, _sizes(passive))
    return exchange.look(passive, exchange.b, factors)[2].sum(1)


def _tolerance(m: int) -> float:
    """Entries of y above minus this (times ``1 + max z``) count as non-negative."""
    # An inner product of m terms is rounded by some m eps of them.
    return 16.0 * m * EPS


def exchange_few(
    C: Floats,
    Q: Floats,
    b: Floats,
    passive: NDArray[np.bool_],
    delta: float = 0.0,
) -> Floats:
    """
    :func:`pivot` of small problems, in numpy, whose calls take half as long as those of torch.

    :param b: ``delta centre - Q``.
    :param passive: As for :func:`pivot`: replaced by the sets found.
    :returns: z >= 0 [k, m], as far as a few exchanges find it.
    :raises numpy.linalg.LinAlgError: If a block of up to 32 rows is singular.
    """
    solver_of = _solvers_of_few(C, delta)
    Z, left, sets, rhs = np.zeros_like(Q), np.arange(len(Q)), passive, b
    for _ in range(_ROUNDS):
        solver = solver_of(sets)
        z = solver(rhs)
        y = product(z, C)
        y -= rhs
        if not delta and np.where(sets, z, y).min() >= 0.0:  # told in a third of the time
            Z[left] = z
            break
        y += _tolerance(len(C)) * (1.0 + np.abs(z).max(axis=1, keepdims=True))
        wrong = np.where(sets, z, y) < 0.0
        going = wrong.any(axis=1)
        if delta and not going.all():
            for _ in range(_REFINEMENTS):
                new = z - solver(product(z, C) + Q[left])
                z = np.where(new.min(axis=1, keepdims=True) < -_SLIGHT, z, new)
        Z[left] = np.maximum(z, 0.0)
        if not going.any():
            break
        left = left[going]
        sets, rhs = sets[going] ^ wrong[going], rhs[going]
        passive[left] = sets
    return Z


def _solvers_of_few(C: Floats, delta: float) -> Callable[[NDArray[np.bool_]], _Solver]:
    """What makes solvers with the blocks of ``C + delta I`` at sets of indices, one per row."""
    unit = np.eye(len(C))
    shifted = C + delta * unit
    if len(C) > _MASKED:
        return lambda sets: _gathered(shifted, sets)

    def masked(sets: NDArray[np.bool_]) -> _Solver:
        # Outside of its set, a row is that of the unit matrix: so all blocks have one size.
        blocks = np.where(sets[:, :, None] & sets[:, None, :], shifted, unit)
        return lambda b: solve(blocks, (b * sets)[:, :, None])[:, :, 0]

    return masked


def _gathered(C: Floats, sets: NDArray[np.bool_]) -> _Solver:
    """Solves with blocks in batches of sets of like size, whose calls take less than torch's."""
    k, m = sets.shape
    count = max(1, _BATCH // (m * m))
    order = np.argsort(sets.sum(axis=1))
    parts = [
        (rows, _batch_of_few(C, sets[rows])) for rows in np.split(order, range(count, k, count))
    ]

    def together(b: Floats) -> Floats:
        z = np.empty_like(b)
        for rows, part in parts:
            z[rows] = part(b[rows])
        return z

    return together


def _batch_of_few(C: Floats, sets: NDArray[np.bool_]) -> _Solver:
    m, sizes = sets.shape[1], sets.sum(axis=1)
    padded = np.zeros((m + 1, m + 1))  # in a fraction of the time of `np.pad`
    padded[:-1, :-1] = C
    rows, members = sets.nonzero()
    places = np.arange(len(rows)) - np.repeat(sizes.cumsum() - sizes, sizes)
    indices = np.full((len(sets), sizes.max(initial=0)), m)
    indices[rows, places] = members
    blocks = padded.take(indices[:, :, None] * (m + 1) + indices[:, None, :])
    blocks.reshape(len(sets), -1)[:, :: indices.shape[1] + 1] += indices == m
    factors = factorize(torch.from_numpy(blocks))[0]

    def apply(b: Floats) -> Floats:
        gathered, z = np.zeros(indices.shape), np.zeros_like(b)
        gathered[rows, places] = b[sets]
        x = torch.cholesky_solve(torch.from_numpy(gathered)[:, :, None], factors).numpy()
        z[sets] = x[rows, places, 0]
        return z

    return apply


@frozen(slots=False)
class _Exchange:
    """:func:`pivot` of any number of rows, of which those that are done leave."""

    C: Tensor
    Q: Tensor
    b: Tensor
    passive: Tensor
    delta: float

    def run(self, rounds: int) -> tuple[Tensor, Tensor]:
        k, m = self.Q.shape
        Z, residuals = torch.zeros_like(self.Q), self.Q.new_full((k,), torch.inf)
        sets = PassiveSets(self.C, self.delta)
        rows = np.arange(k)
        sizes = _sizes(self.passive)
        fewest, failures = np.full(k, m + 1), np.zeros(k, dtype=np.int64)
        for number in range(rounds):
            at = index(rows, Z)
            f, rhs = self.passive[at], self.b[at]
            factors = sets.factors(f, sizes)
            z, y, wrong = self.look(f, rhs, factors)
            counts = wrong.sum(1)
            f ^= self._one_of_two(wrong, f, z, y)
            self.passive[at] = f
            asked = torch.stack((counts, f.sum(1))).tolist()  # the host waits here alone
            count, sizes = np.array(asked, dtype=np.int64)
            failures[rows] += count >= fewest[rows]
            fewest[rows] = np.minimum(count, fewest[rows])
            going = (count > 0) & (count <= m * 0.5 ** (number / _HALVED))
            going &= (failures[rows] < _CREDIT) & (number < rounds - 1)
            if not going.all():
                if self.delta and not count[~going].all():
                    z = self._refined(self.Q[at], z, factors)
                leaving = index(np.flatnonzero(~going), Z)
                at, found = at[leaving], z[leaving].clamp_min_(0.0)
                changed = bool(self.delta or count[~going].any())
                y = torch.addmm(self.Q[at], found, self.C) if changed else y[leaving]
                Z[at], residuals[at] = found, _residual(found, y)
            rows, sizes = rows[going], sizes[going]
            if not rows.size:
                break
        return Z, residuals

    def look(self, passive: Tensor, rhs: Tensor, factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
        """The z and y of some sets, and where they are negative."""
        z = factors.solve(rhs)
        y = torch.addmm(rhs, z, self.C, beta=-1.0)
        largest = torch.linalg.vector_norm(z, torch.inf, 1, keepdim=True)
        below = -_tolerance(len(self.C)) * (1.0 + largest)
        return z, y, torch.where(passive, z < 0.0, y < below)

    def _one_of_two(self, wrong: Tensor, passive: Tensor, z: Tensor, y: Tensor) -> Tensor:
        """The wrong entries, but for the less wrong one of two rows that make a pair."""
        partner = self._partners
        how = torch.where(passive, z, y)
        other = how[:, partner]
        first = (how < other) | ((how == other) & (self._numbers <= partner))
        return wrong & (first | ~wrong[:, partner])

    @cached_property
    def _numbers(self) -> Tensor:
        return torch.arange(len(self.C), device=self.C.device)

    @cached_property
    def _partners(self) -> Tensor:
        """The one row that each is nearly equal or opposite to [m]; itself if there are more."""
        near = (self.C.abs() > _PAIR).fill_diagonal_(False)
        alone = near.sum(1) == 1
        near &= alone & alone[:, None]
        return torch.where(near.any(1), near.byte().argmax(1), self._numbers)

    def _refined(self, q: Tensor, z: Tensor, factors: Factors) -> Tensor:
        """Steps towards the solution without the proximal term, if no sign would change much."""
        for _ in range(_REFINEMENTS):
            new = z - factors.solve_roughly(torch.addmm(q, z, self.C))
            z = torch.where(new.amin(1, keepdim=True) < -_SLIGHT, z, new)
        return z


def _sizes(sets: Tensor) -> Integers:
    return np.array(sets.sum(1).tolist(), dtype=np.int64)


def index(positions: NDArray[Any], like: Tensor) -> Tensor:
    """Numbers that the host knows, for the device of a Tensor."""
    return torch.from_numpy(positions).to(like.device, non_blocking=True)


class PassiveSets:
    """
    Makes what solves with ``C + delta I`` on any sets of indices.

    :param C: Positive semi-definite matrix [m, m].
    :param delta: The proximal term.
    """

    def __init__(self, C: Tensor, delta: float) -> None:
        # One more row and column pad the shorter sets of a batch.
        self._padded = torch.nn.functional.pad(C, (0, 1, 0, 1))
        self._padded.diagonal()[:-1].add_(delta)
        self.matrix = self._padded[:-1, :-1]

    @cached_property
    def _factor(self) -> tuple[Tensor, Tensor]:
        return factorize(self.matrix)

    @cached_property
    def pivot(self) -> float:
        """The smallest one of the matrix, squared; 0 if it has no factor."""
        factor, failed = self._factor
        return float(torch.where(failed == 0, factor.diagonal().min() ** 2, 0.0))

    @cached_property
    def both(self) -> Tensor:
        """The matrix and its inverse, padded [2, m + 1, m + 1]."""
        inverse = torch.cholesky_inverse(self._factor[0])
        return torch.stack((self._padded, torch.nn.functional.pad(inverse, (0, 1, 0, 1))))

    def factors(self, passive: Tensor, sizes: Integers) -> Factors:
        """
        What solves on index sets F.

        :param passive: The sets, bool [k, m].
        :param sizes: Their sizes [k].
        """
        m = passive.shape[1]
        complements = np.minimum(sizes, m - sizes)
        saved = (sizes**3.0 - complements**3.0).sum()
        with one_thread(passive.is_cpu):
            if saved > _INVERSE * m**3 and self.pivot >= _DEPENDENT:
                many = index(np.flatnonzero(sizes > complements), passive)
                return Factors(self, self.both, passive, complements, many)
            return Factors(self, self._padded[None], passive, sizes, None)


class Factors:
    """
    What solves with a matrix M on one index set F per row, by factors of blocks.

    Where most indices are in, these are those of the inverse P on the complement A: the z of
    ``P b`` that is zero in A is ``P b - P_A (P_AA)⁻¹ (P b)_A``.

    :param whole: What knows the matrix.
    :param matrices: M, and P if that is needed, padded [1 or 2, m + 1, m + 1].
    :param passive: The sets F, bool [k, m].
    :param sizes: Those of the blocks [k].
    :param many: The rows of which the complement is factorised.
    """

    def __init__(
        self,
        whole: PassiveSets,
        matrices: Tensor,
        passive: Tensor,
        sizes: Integers,
        many: Tensor | None,
    ) -> None:
        self._whole, self._many, m = whole, many, passive.shape[1]
        self._order = order = index(np.argsort(sizes), passive)
        sets = passive
        if many is not None:
            self._within, self._inverse = passive[many], matrices[1, :-1, :-1]
            sets = passive.index_copy(0, many, ~self._within)
        ends = np.sort(sizes).tolist()
        indices = _indices(sets[order], int(sizes.max(initial=0)))
        rows = indices * (m + 1)
        if many is not None:
            inverted = torch.zeros_like(order).index_fill_(0, many, matrices[0].numel())
            rows += inverted[order][:, None]
        self._batches: list[tuple[slice, Tensor, Tensor]] = []
        entries = _ENTRIES if passive.is_cpu else _ENTRIES_ELSEWHERE
        end = len(ends)
        while end and ends[end - 1]:
            size = ends[end - 1]
            batch = slice(max(0, end - max(1, entries // (size * size))), end)
            members = indices[batch, :size]
            places = (rows[batch, :size, None] + members[:, None, :]).view(-1)
            blocks = matrices.view(-1).index_select(0, places).view(-1, size, size)
            blocks.diagonal(dim1=1, dim2=2).add_(members == m)
            self._batches.append((batch, members, factorize(blocks)[0]))
            end = batch.start

    def solve(self, b: Tensor) -> Tensor:
        """Rows z with ``M_FF z_F = b_F``, and zero elsewhere."""
        z = self.solve_roughly(b)
        # Batched solves of CUDA leave larger residuals than rounding does, and so does the inverse:
        # signs would be wrong where rows nearly depend.
        count = 0 if self._many is None else sum(self._whole.pivot < limit for limit in _CORRECTED)
        for _ in range(count + (not b.is_cpu)):
            z = z + self.solve_roughly(torch.addmm(b, z, self._whole.matrix, alpha=-1.0))
        return z

    def solve_roughly(self, b: Tensor) -> Tensor:
        """:meth:`solve`, maybe to a few digits only, as a step of refinement needs."""
        if self._many is None:
            return self._solve_blocks(b)
        images = (b[self._many] * self._within) @ self._inverse
        z = self._solve_blocks(b.index_copy(0, self._many, images))
        images.addmm_(z[self._many], self._inverse, alpha=-1.0)
        return z.index_copy_(0, self._many, images.mul_(self._within))

    def _solve_blocks(self, b: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(b, (0, 1))[self._order]
        z = torch.zeros_like(padded)
        with one_thread(b.is_cpu):
            for batch, members, factor in self._batches:
                x = torch.cholesky_solve(padded[batch].gather(1, members)[:, :, None], factor)
                z[batch].scatter_(1, members, x[:, :, 0])
        return torch.empty_like(z).index_copy_(0, self._order, z)[:, :-1]


def _indices(sets: Tensor, width: int) -> Tensor:
    """The members of sets [k, m] in order [k, width], filled up with m."""
    k, m = sets.shape
    # What is no member goes to a column that is cut off: no size has to be asked of the device.
    places = torch.where(sets, sets.cumsum(1) - 1, width)
    members = torch.arange(m, device=sets.device).expand(k, m)
    filled = torch.full((k, width + 1), m, device=sets.device)
    return filled.scatter_(1, places, members)[:, :width]
