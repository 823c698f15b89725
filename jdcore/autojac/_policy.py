"""
How many rows the library differentiates at once if the user leaves it open.

Measured with one CPU thread, torch 2.13, against single rows (see ``tests/benchmarks/autojac.py``):
vmap makes a vector of 32 losses of a 64-wide perceptron 3 times faster and that of a GRU 1.7 times,
where the time of a row is spent on calling operators rather than in them. Perceptrons from width
256 on are 0.8 to 1.4, transformers 0.5 to 0.9 and convolutions 0.6 to 0.9 times as fast. With
separate losses each vmapped row passes through the heads of all the others too, which a single row
does not.

On accelerators calling operators costs relatively more, so vmap is chosen for everything but
convolutions (whose weight gradients become grouped convolutions). This is a rule of thumb.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from jdcore.autojac._vmap import Kind

# Enough rows to make the calls cheap, few enough to bound the m-fold gradients of activations.
_MOST_ROWS = 64
# Mean number of parameters per operator up to which the calls cost more than the arithmetic.
_SMALL = 4096


def choose_chunk_size(kind: Kind, inputs: Sequence[Tensor], usage: Sequence[Sequence[bool]]) -> int:
    """
    :param kind: The graph to be differentiated.
    :param inputs: The tensors with respect to which it is.
    :param usage: For each row, which outputs it differentiates.
    :returns: The number of rows to differentiate at once; 1 means without vmap.
    """
    if not kind.worth_vmap or any(tensor._backward_hooks for tensor in inputs):
        return 1
    on_cpu = any(tensor.device.type == "cpu" for tensor in inputs)
    if on_cpu and not (all(map(all, usage)) and _is_small(kind, inputs)):
        return 1
    return min(len(usage), _MOST_ROWS)


def _is_small(kind: Kind, inputs: Sequence[Tensor]) -> bool:
    return sum(tensor.numel() for tensor in inputs) <= _SMALL * kind.size
