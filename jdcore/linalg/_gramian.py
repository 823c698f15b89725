from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jdcore._modes import has_tangent, innermost_transform
from jdcore.errors import ParameterError, ParameterTypeError
from jdcore.linalg._blas import add_short_products, is_small, short_columns, small_gramian
from jdcore.validators import check_blocks

# Float64 entries of the pieces that are multiplied: 512 KB are large enough for the product to run
# at full speed, small enough to stay in the second cache of a core, beside what they are converted
# from; with 2 MB, 4 to 16 rows take 1.2 to 1.8 times as long. An accelerator wants few calls.
_ENTRIES = 1 << 16
_ENTRIES_ELSEWHERE = 1 << 24
_NARROWEST = 1024  # columns, below which the product itself gets slow
# Numbers of rows whose products on a CPU are so small beside their factors that an ordinary product
# takes twice as long to arrange these as to multiply them.
_SHORT = range(2, 65)
# Entries up to which blocks are joined, converted and multiplied by one call each: beside a few
# layers of a small network, each further call takes longer than what it does. Long rows would keep
# most of an accelerator waiting.
_ONE, _ONE_ELSEWHERE = 1 << 17, 1 << 15
# Rows from which on half of a product is left out on a CPU, and how many strips it is cut into.
_MANY, _STRIPS = 96, 4
_MIRRORED = 256  # rows up to which numpy copies a triangle in less time than torch
# Columns of one product of a batch on accelerators.
_BATCHED = 4096


def gramian(jacobian: Tensor | Sequence[Tensor], /) -> Tensor:
    """
    Gramian ``J Jᵀ`` of a matrix, or of a Jacobian given as column blocks, in float64.

    Blocks are not concatenated, unless they are small or the Gramian is to be differentiated, and
    need not share a dtype. Accumulating in float64 keeps the error near 1e-13 of the largest
    diagonal entry where ``J @ J.T`` in float32 reaches 1e-3 for long rows, and neither overflows
    nor underflows for any float32 input.

    :param jacobian: Matrix [m, n] of a real floating dtype, or blocks [m, n1], [m, n2], ...
    :returns: float64 Tensor [m, m] on the device of the Jacobian, exactly symmetric.
    :raises ParameterError: If a block is no matrix, or the blocks differ in their number of rows.
    """
    blocks = _blocks_of(jacobian, "jacobian")
    check_blocks(blocks, "jacobian")
    return sum_gramians(blocks)


def _blocks_of(jacobian: Tensor | Sequence[Tensor], parameter: str) -> list[Tensor]:
    if isinstance(jacobian, Tensor):
        return [jacobian]
    if not isinstance(jacobian, Iterable):
        raise ParameterTypeError(parameter, "a matrix, or a list of them", repr(jacobian))
    return list(jacobian)


def sum_gramians(blocks: Sequence[Tensor]) -> Tensor:
    """:func:`gramian` of blocks that have been checked."""
    if len(blocks) == 1 and is_small(blocks[0]):
        return torch.from_numpy(small_gramian(blocks[0])[1])
    if innermost_transform() is not None or any(map(_is_differentiated, blocks)):
        rows = torch.cat([block.to(blocks[0].device, torch.float64) for block in blocks], 1)
        return symmetric(rows.mm(rows.T))
    return gramian_and_rows(blocks)[0]


def _is_differentiated(block: Tensor) -> bool:
    return (block.requires_grad and torch.is_grad_enabled()) or has_tangent(block)


def gramian_and_rows(blocks: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """
    :func:`gramian` of blocks that have been checked, and what was made on the way.

    :returns: The Gramian, and all rows in float64 [m, n]; None where they were converted piece by
        piece.
    """
    m, on_cpu = blocks[0].shape[0], blocks[0].is_cpu
    rows = _joined(blocks)
    if rows is not None:
        if m < _MANY:
            total = rows.mm(rows.T)
            return _mirrored(total) if total.is_cpu else symmetric(total), rows
        total = rows.new_empty((m, m))
        _add_product(total, rows, beta=0.0)
        return _mirrored(total), rows
    if on_cpu and m in _SHORT:
        return _sum_of_short(blocks), None
    total = blocks[0].new_zeros((m, m), dtype=torch.float64)
    if not on_cpu:
        columns = max(1, -(-_width(blocks, _ENTRIES_ELSEWHERE) // _BATCHED)) * _BATCHED
        return symmetric(_sum_in_batches(total, list(_pieces(blocks, columns)), columns)), None
    buffer = total.new_empty((m, _width(blocks, _ENTRIES)))
    for filled in _filled(buffer, blocks):
        _add_product(total, buffer[:, :filled])
    return _mirrored(total), None


def _joined(blocks: Sequence[Tensor]) -> Tensor | None:
    """The rows of blocks in float64, side by side; None if that are too many entries."""
    entries = sum([block.numel() for block in blocks])
    if entries > _ONE:
        return None
    if all(block.is_cpu for block in blocks):
        return (torch.cat(list(blocks), 1) if len(blocks) > 1 else blocks[0]).double()
    # Several may lie on several devices.
    return blocks[0].double() if len(blocks) == 1 and entries <= _ONE_ELSEWHERE else None


@np.errstate(over="ignore", invalid="ignore")
def _sum_of_short(blocks: Sequence[Tensor]) -> Tensor:
    m = blocks[0].shape[0]
    # A row and a column more than there are, as `add_short_products` wants them.
    wide, total = np.empty((m + 1, short_columns(m))), np.zeros((m, m + 1))
    wide[m] = 0.0
    for filled in _filled(torch.from_numpy(wide[:m]), blocks):
        add_short_products(total, wide[:, :filled])
    return _mirrored(torch.from_numpy(total[:, :m].copy()))


@lru_cache(maxsize=16)
def _upper(m: int) -> NDArray[np.bool_]:
    upper: NDArray[np.bool_] = np.tri(m, k=-1, dtype=np.bool_).T
    return upper


def _width(blocks: Sequence[Tensor], entries: int) -> int:
    """Columns of a buffer of some entries, or what there is if that is less."""
    columns = max(_NARROWEST, entries // max(1, blocks[0].shape[0]))
    return min(columns, sum(block.shape[1] for block in blocks))


def _filled(buffer: Tensor, blocks: Sequence[Tensor]) -> Iterator[int]:
    """
    Fill a buffer with the columns of blocks again and again.

    One buffer, since fresh large temporaries cost more in page faults than in arithmetic. Narrow
    blocks share it, which saves calls.

    :returns: How many columns of it are filled, whenever it is full and at the end.
    """
    filled, columns = 0, buffer.shape[1]
    for piece in _pieces(blocks, max(1, columns)):
        end = filled + piece.shape[1]
        if end > columns:
            yield filled
            filled, end = 0, piece.shape[1]
        buffer[:, filled:end].copy_(piece)
        filled = end
    yield filled


def _sum_in_batches(total: Tensor, pieces: Sequence[Tensor], columns: int) -> Tensor:
    """
    Add products of pieces to a total, with a number of calls that depends on their size alone.

    A product of a few long rows keeps most of an accelerator waiting: it is made of many short ones
    at once. Of many narrow pieces, all that fit are converted by one call.

    :param columns: Width of the buffer, a multiple of that of the short products.
    """
    m = len(total)
    buffer = total.new_empty((m, columns))
    start = 0
    while start < len(pieces):
        widths: list[int] = []
        filled = 0
        for piece in pieces[start:]:
            width = piece.shape[1]
            if filled + width > columns:
                break
            widths.append(width)
            filled += width
        places = torch.split(buffer[:, :filled], widths, dim=1)
        torch._foreach_copy_(list(places), list(pieces[start : start + len(places)]))
        start += len(places)
        end = -(-filled // _BATCHED) * _BATCHED
        # The last of the short products reads beyond what is filled, where older pieces lie.
        buffer[:, filled:end].zero_()
        short = buffer[:, :end].view(m, end // _BATCHED, _BATCHED).transpose(0, 1)
        total += torch.bmm(short, short.mT).sum(0)
    return total


def cross_gramian(
    jacobian: Tensor | Sequence[Tensor], other: Tensor | Sequence[Tensor], /
) -> Tensor:
    """
    Cross-Gramian ``J₁ J₂ᵀ`` of two matrices, or of Jacobians given as column blocks, in float64.

    :param jacobian: Matrix [m, n] of a real floating dtype, or blocks [m, n1], [m, n2], ...
    :param other: A matrix [l, n], or blocks [l, n1], [l, n2], ... on the same device.
    :returns: float64 Tensor [m, l] on that device.
    :raises ParameterError: If a block is no matrix, or the two do not have the same columns.
    """
    one, two = _blocks_of(jacobian, "jacobian"), _blocks_of(other, "other")
    check_blocks(one, "jacobian")
    check_blocks(two, "other")
    columns, others = ([block.shape[1] for block in blocks] for blocks in (one, two))
    if columns != others:
        raise ParameterError("other", f"of {columns} columns, as the first", f"{others} columns")
    return sum_cross_gramians(one, two)


def sum_cross_gramians(blocks: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """:func:`cross_gramian` of blocks that have been checked."""
    shape = (len(blocks[0]), len(others[0]))
    total = blocks[0].new_zeros(shape, dtype=torch.float64)
    entries = _ENTRIES if blocks[0].is_cpu else _ENTRIES_ELSEWHERE
    columns = max(_NARROWEST, entries // max(1, *shape))
    pairs = zip(_pieces(blocks, columns), _pieces(others, columns), strict=True)
    for one, two in pairs:
        total.addmm_(one.double(), two.double().T)
    return total


def symmetric(product: Tensor) -> Tensor:
    """
    A product ``A Aᵀ`` made exactly symmetric.

    Some BLAS libraries block the two triangles of a general product differently (on AMD
    processors, for one), which then differ in their last bit.
    """
    return torch.maximum(product, product.T) if len(product) > 1 else product


def _pieces(blocks: Sequence[Tensor], columns: int) -> Iterator[Tensor]:
    for block in blocks:
        n = block.shape[1]
        if n <= columns:
            yield block
        else:
            for start in range(0, n, columns):
                yield block[:, start : start + columns]


def _add_product(total: Tensor, wide: Tensor, *, beta: float = 1.0) -> None:
    """Add ``A Aᵀ`` to beta times a total: of many rows to the lower triangle, strip by strip."""
    m = len(total)
    strip = max(1, m) if m < _MANY else -(-m // _STRIPS)
    for start in range(0, m, strip):
        rows = slice(start, start + strip)
        part = total[rows, : rows.stop]
        torch.addmm(part, wide[rows], wide[: rows.stop].T, beta=beta, out=part)


def _mirrored(total: Tensor) -> Tensor:
    """A total of :func:`_add_product` with both triangles; it may be overwritten."""
    if is_small(total, rows=_MIRRORED, most=_MIRRORED**2):
        array = total.numpy()
        np.copyto(array, array.T, where=_upper(len(array)))
        return total
    # The upper one may hold anything, also NaN, which no product with zeros would remove.
    lower = total.tril()
    return lower + lower.tril(-1).T
