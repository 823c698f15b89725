from __future__ import annotations

import torch
from torch import Tensor

from jdcore.autogram._scratch import pieces

# Products of fewer positions than these are slow.
_POSITIONS = 256


def contract(gram: Tensor, grads: Tensor) -> Tensor:
    """
    ``G[(k,a), (l,b)] = sum_ts gram[(a,t), (b,s)] <grads[k,a,t], grads[l,b,s]>``.

    :param gram: Gram matrix of the inputs over all positions, shape [B*T, B*T]. May be overwritten.
    :param grads: Output gradients, shape [K, B, T, o].
    :returns: Shape [K*B, K*B].
    """
    K, B, T, o = grads.shape
    if T == 1:
        flat = grads.reshape(K * B, o)
        product = (flat @ flat.T).view(K, B, K, B)
        return product.mul_(gram.view(1, B, 1, B)).view(K * B, K * B)
    if K == 1:
        return _contract_one_task(gram, grads[0])
    if B == 1:
        return _contract_tasks(gram, grads)
    return _contract_samples(gram, grads)


def _contract_one_task(gram: Tensor, grads: Tensor) -> Tensor:
    """By some samples at a time, which need less memory, and their products with earlier ones."""
    B, T, o = grads.shape
    flat = grads.reshape(B * T, o)
    total = flat.new_empty((B, B), dtype=torch.float64)
    for start, stop in pieces(B, max(_POSITIONS // T, -(-B // 8))):
        rows, columns = slice(start * T, stop * T), slice(0, stop * T)
        product = (flat[rows] @ flat[columns].T).mul_(gram[rows, columns])
        share = product.view(stop - start, T, stop, T).sum((1, 3), dtype=torch.float64)
        total[start:stop, :stop] = share
        total[:start, start:stop] = share[:, :start].T
    return total


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
    total = grads.new_empty(K, B, K, B)
    by_sample = gram.view(B * T, B, T)
    for b in range(B):
        of_sample = grads[:, b].transpose(0, 1).reshape(T, K * o)
        mixed = (by_sample[:, b] @ of_sample).view(B, T, K, o)
        total[..., b] = torch.einsum("kato,atlo->kal", grads, mixed)
    return total.view(K * B, K * B)
