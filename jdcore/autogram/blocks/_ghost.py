from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from jdcore.autogram._accumulator import halves, lower_product
from jdcore.autogram._scratch import pieces

# Products of fewer positions than these are slow.
_POSITIONS = 256

Gram = Callable[[int, int], Tensor]
"""
Gives the Gram matrix of the inputs: its rows at the positions of samples start to stop, its columns
at those of samples 0 to stop. What it gives may be overwritten.
"""


def linear_gram(inputs: Tensor, plus: float = 0.0) -> Gram:
    """
    Of inputs as they are.

    :param inputs: Shape [B, T, i].
    :param plus: Added to all entries.
    """
    T = inputs.shape[1]
    flat = inputs.flatten(0, 1)

    def gram(start: int, stop: int) -> Tensor:
        product = lower_product(flat, start * T, stop * T)
        return product.add_(plus) if plus else product

    return gram


def contract(gram: Gram, grads: Tensor) -> Iterator[tuple[Tensor, int]]:
    """
    ``G[(k,a), (l,b)] = sum_ts gram[(a,t), (b,s)] <grads[k,a,t], grads[l,b,s]>``.

    :param gram: The Gram matrix of the inputs.
    :param grads: Output gradients, shape [K, B, T, o].
    :returns: Some rows of the Gramian [K*B, K*B] at a time, up to their diagonal at least, and the
        number of the first.
    """
    K, B, T, o = grads.shape
    if K == 1:
        yield from _contract_one_task(gram, grads[0])
    elif T == 1:
        flat = grads.reshape(K * B, o)
        product = (flat @ flat.T).view(K, B, K, B)
        yield product.mul_(gram(0, B).view(1, B, 1, B)).view(K * B, K * B), 0
    elif B == 1:
        yield _contract_tasks(gram(0, 1), grads), 0
    else:
        yield _contract_samples(gram(0, B), grads), 0


def _contract_one_task(gram: Gram, grads: Tensor) -> Iterator[tuple[Tensor, int]]:
    B, T, o = grads.shape
    flat = grads.reshape(B * T, o)
    for start, stop in halves(B) if T == 1 else pieces(B, max(_POSITIONS // T, -(-B // 8))):
        product = lower_product(flat, start * T, stop * T).mul_(gram(start, stop))
        if T > 1:
            product = product.view(stop - start, T, stop, T).sum((1, 3), dtype=torch.float64)
        yield product, start


def _contract_tasks(gram: Tensor, grads: Tensor) -> Tensor:
    K, _, T, o = grads.shape
    flat = grads.reshape(K, T * o)
    total = flat.new_empty((K, K), dtype=torch.float64)
    for k in range(K):
        mixed = (gram @ grads[k, 0]).view(T * o)
        total[:, k] = _inner_products(flat, mixed)
    return total


def _inner_products(rows: Tensor, vector: Tensor) -> Tensor:
    # In pieces: one float32 sum over millions of entries loses half of its digits.
    pieces = zip(torch.split(rows, 16384, dim=1), torch.split(vector, 16384), strict=True)
    return torch.stack([(row @ piece).double() for row, piece in pieces]).sum(0)


def _contract_samples(gram: Tensor, grads: Tensor) -> Tensor:
    K, B, T, o = grads.shape
    by_task = grads.reshape(K, B * T, o)
    total = grads.new_zeros((K, B, K, B), dtype=torch.float64)
    for k in range(K):
        for earlier in range(k + 1):
            product = (by_task[k] @ by_task[earlier].T).mul_(gram)
            share = product.view(B, T, B, T).sum((1, 3), dtype=torch.float64)
            total[k, :, earlier] = share
    return total.view(K * B, K * B)
