from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from jdcore.autojac._matrix import as_matrix


def jacobians(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    *,
    retain_graph: bool = False,
    chunk_size: int | None = None,
) -> list[Tensor]:
    """
    Multiply initial Jacobians by the Jacobian of the outputs with respect to the inputs.

    :param outputs: Tensors to differentiate; those that do not require grad contribute nothing.
    :param inputs: Tensors that require grad.
    :param cotangents: Initial Jacobians [m, *S_output], one per output.
    :param retain_graph: Whether the graph can be differentiated again afterwards.
    :param chunk_size: Rows differentiated at once; None means: row by row.
    :returns: One new contiguous tensor [m, *S_input] per input, sharing memory with no other.
    """
    m = len(cotangents[0])
    results = [_empty(m, tensor) for tensor in inputs]
    chunks = _plan(outputs, cotangents, chunk_size or 1)
    last = max((start for start, _, used in chunks if used), default=-1)
    for start, stop, used in chunks:
        if not used:
            for result in results:
                result[start:stop].zero_()
            continue
        gradients = _differentiate(
            [outputs[k] for k in used],
            inputs,
            [cotangents[k][start:stop] for k in used],
            retain_graph=retain_graph or start != last,
        )
        while gradients:
            # Popping frees each gradient as soon as it is copied.
            _write(results[len(gradients) - 1][start:stop], gradients.pop())
    return results


def _plan(
    outputs: Sequence[Tensor], cotangents: Sequence[Tensor], chunk_size: int
) -> list[tuple[int, int, list[int]]]:
    """Chunks of rows (start, stop), each with the outputs that matter for it."""
    m = len(cotangents[0])
    live = [k for k, output in enumerate(outputs) if output.requires_grad]
    masks = [(as_matrix(cotangents[k]) != 0).any(dim=1).cpu() for k in live]
    used = torch.stack(masks).tolist()
    chunks = []
    for start in range(0, m, chunk_size):
        stop = min(start + chunk_size, m)
        # An output whose rows are all zero is left out: passing zeros through its graph costs time
        # and turns into NaN wherever that graph has an infinite derivative.
        needed = [k for k, mask in zip(live, used, strict=True) if any(mask[start:stop])]
        chunks.append((start, stop, needed))
    return chunks


def _differentiate(
    outputs: list[Tensor], inputs: Sequence[Tensor], cotangents: list[Tensor], *, retain_graph: bool
) -> list[Tensor | None]:
    batched = len(cotangents[0]) > 1
    with warnings.catch_warnings():
        # vmap runs operators that it cannot batch one by one, which is what we would do.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        gradients = torch.autograd.grad(
            outputs,
            inputs,
            cotangents if batched else [cotangent[0] for cotangent in cotangents],
            retain_graph=retain_graph,
            allow_unused=True,
            is_grads_batched=batched,
        )
    return list(gradients) if batched else [g if g is None else g[None] for g in gradients]


def _write(rows: Tensor, gradient: Tensor | None) -> None:
    if gradient is None:
        rows.zero_()
    else:
        rows.copy_(gradient if gradient.layout == torch.strided else gradient.to_dense())


def _empty(m: int, tensor: Tensor) -> Tensor:
    return torch.empty((m, *tensor.shape), dtype=tensor.dtype, device=tensor.device)
