from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from jdcore.graph.shares._product import long_product, product, widened
from jdcore.graph.shares._share import Accumulator, lower_product

Gram = Callable[[int, int], Tensor]
"""
Gives the Gram matrix of the inputs: its rows at the positions of samples start to stop, its columns
at those of samples 0 to stop. What it gives may be overwritten.
"""


def linear_gram(inputs: Tensor, *, one_more: bool = False) -> Gram:
    """
    Of inputs as they are.

    :param inputs: Shape [B, T, i].
    :param one_more: Whether there is one more input, which is 1.
    """
    T = inputs.shape[1]
    flat = inputs.flatten(0, 1)

    def gram(start: int, stop: int) -> Tensor:
        found = lower_product(flat, start * T, stop * T)
        return found.add_(1.0) if one_more else found

    return gram


def add_contracted(gram: Gram, grads: Tensor, total: Accumulator) -> None:
    """
    Add ``G[(k,a), (l,b)] = sum_ts gram[(a,t), (b,s)] <grads[k,a,t], grads[l,b,s]>``.

    :param gram: The Gram matrix of the inputs.
    :param grads: Shape [K, B, T, o].
    """
    K, B, T, o = grads.shape
    if K == 1:
        _add_one_task(gram, grads[0], total)
    elif T == 1:
        flat = grads.reshape(K * B, o)
        # One product of all tasks; the Gram matrix of the inputs is the same for each pair of them.
        found = product(flat, flat.T).view(K, B, K, B)
        total.add(found.mul_(gram(0, B).view(1, B, 1, B)).view(K * B, K * B))
    elif B == 1:
        total.add(_contract_tasks(gram(0, 1), grads, total))
    else:
        total.add(_contract_samples(gram(0, B), grads, total))


def _add_one_task(gram: Gram, grads: Tensor, total: Accumulator) -> None:
    """Some rows of the Gramian at a time, up to their diagonal."""
    B, T, o = grads.shape
    flat = grads.reshape(B * T, o)
    parts = total.halves() if T == 1 else total.memory.pieces(B, T * B * T)
    for start, stop in parts:
        found = lower_product(flat, start * T, stop * T).mul_(gram(start, stop))
        total.add(summed_up(found[None], T, total, start)[0] if T > 1 else found, start)
        del found  # before there are those of the next piece


def summed_up(products: Tensor, T: int, total: Accumulator, first: int = 0) -> Tensor:
    """
    The inner products of samples, as sums of those of their positions.

    :param products: Of several layers, shape [n, b T, B T].
    :param T: Positions per sample.
    :param total: Takes note of how large the products are that may cancel.
    :param first: The sample of the first rows.
    :returns: Shape [n, b, B], float64.
    """
    n, _, columns = products.shape
    squares = products.diagonal(first * T, 1, 2).reshape(n, -1, T)
    total.note(squares.sum((0, 2), dtype=torch.float64), first)
    by_sample = products.view(n, -1, T, columns // T, T)
    return by_sample.sum((2, 4), dtype=torch.float64)


def _contract_tasks(gram: Tensor, grads: Tensor, total: Accumulator) -> Tensor:
    K, _, T, o = grads.shape
    memory, rows = total.memory, widened(grads.reshape(K, T * o))
    squares = rows.view(K, T, o).norm(dim=2).double().square()
    total.note((squares * gram.diagonal()).sum(1))
    parts = [
        long_product(rows, product(gram, rows[start:stop].view(-1, T, o)).flatten(1))
        for start, stop in memory.pieces(K, T * o)
    ]
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def _contract_samples(gram: Tensor, grads: Tensor, gramian: Accumulator) -> Tensor:
    K, B, T, o = grads.shape
    by_task = grads.reshape(K, B * T, o)
    total = gram.new_zeros((K, B, K, B), dtype=torch.float64)
    for k in range(K):
        # Pairs of tasks up to the diagonal: the rest is symmetric.
        for earlier in range(k + 1):
            found = product(by_task[k], by_task[earlier].T).mul_(gram)
            total[k, :, earlier] = found.view(B, T, B, T).sum((1, 3), dtype=torch.float64)
        squares = found.diagonal().reshape(B, T).sum(1, dtype=torch.float64)
        gramian.note(squares, k * B)
    return total.view(K * B, K * B)
