"""
One layer of an LSTM in one direction, as the fused kernel of torch runs it on CPUs in float32.

The kernel keeps its gates to itself, so they are computed once more, for all steps in one product:
the states before each step are those that it returned. What is left to do step by step is the
backward recursion, which gives the gradients at the gates; with these the weights are those of
linear layers over T positions.
"""

from __future__ import annotations

import torch
from attrs import frozen
from torch import Tensor

from jdcore.graph._site import NoRule, Site
from jdcore.graph.rules._table import rule
from jdcore.graph.shares import Dense, Outer, Share, product, widened

# As cuDNN numbers them: 0 and 1 are plain networks (ReLU, tanh), 2 is LSTM, 3 is GRU.
_LSTM_MODE = 2


@rule("MkldnnRnnLayerBackward0")
def fused_lstm(site: Site, operand: int) -> Share:
    """Input weight, hidden weight and their biases."""
    if operand not in (1, 2, 3, 4) or site.saved("mode") != _LSTM_MODE:
        raise NoRule
    if "gates" not in site.memo:
        _refuse_other_orders(site)
        site.memo["gates"] = _gates_of(site)
    inputs, states, grads = site.memo["gates"]
    shape = site.shapes[operand]
    if operand > 2:
        return Dense(grads.sum(2), shape)
    chosen = inputs if operand == 1 else states
    return Outer(chosen, grads, grads_first=True, shape=shape)


def _refuse_other_orders(site: Site) -> None:
    """The samples have to be the sequences."""
    for layout, grads in zip(site.layouts, site.grads, strict=True):
        if grads is None:
            continue
        # They come before the features, in whatever shape.
        if layout is None or layout.index is not None or layout.dim != grads.ndim - 3:
            raise NoRule
        if layout.after * layout.samples != grads.shape[-2]:
            raise NoRule


def _gates_of(site: Site) -> tuple[Tensor, Tensor, Tensor]:
    """
    Compute the gates again, and the gradients there.

    :returns: What multiplies the weights, samples first: the inputs, the hidden states before each
        step, and the gradients at the gates [K, B, positions, 4 h].
    """
    kinds = ["weight0", "weight1", "weight2", "weight3"][: 4 if site.saved("has_biases") else 2]
    weights = [widened(site.saved(kind)) for kind in kinds]
    inputs, outputs = widened(site.saved("input")), widened(site.saved("result0"))
    of_outputs, of_state, of_cell = (None if g is None else widened(g) for g in site.grads[:3])
    if site.saved("reverse"):
        inputs, outputs = inputs.flip(0), outputs.flip(0)
        of_outputs = None if of_outputs is None else of_outputs.flip(1)
    first = widened(site.saved("hx_")).reshape(1, *outputs.shape[1:])
    states = torch.cat([first, outputs[:-1]])
    gates = product(inputs, weights[0].T) + product(states, weights[1].T)
    for bias in weights[2:]:
        gates += bias
    factors = _factors(gates, widened(site.saved("cx_")).reshape(outputs.shape[1:]))
    at_gates = _backward(factors, weights[1], of_outputs, of_state, of_cell)
    B = site.samples
    return _samples_first(inputs, B), _samples_first(states, B), _samples_first(at_gates, B)


@frozen(eq=False)
class _Factors:
    """Derivatives at each step, shape [T, N, h] each."""

    forget: Tensor
    cell_by_state: Tensor
    gates: tuple[Tensor, Tensor, Tensor]
    """Input, forget and cell gate, per unit of the gradient at the cell."""
    output_gate: Tensor
    """Per unit of the gradient at the hidden state."""


def _factors(gates: Tensor, cell: Tensor) -> _Factors:
    i, f, g, o = gates.chunk(4, dim=-1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    before = torch.empty_like(f)
    cells = torch.empty_like(f)
    for t, step in enumerate(i * g):
        before[t] = cell
        cell = torch.addcmul(step, f[t], cell, out=cells[t])
    # One call for all steps: only the recursion of the cells has to be a loop.
    squashed = cells.tanh()
    return _Factors(
        forget=f,
        cell_by_state=o * (1 - squashed.square()),
        gates=(g * i * (1 - i), before * f * (1 - f), i * (1 - g.square())),
        output_gate=squashed * o * (1 - o),
    )


def _backward(
    factors: _Factors,
    recurrent: Tensor,
    of_outputs: Tensor | None,
    of_state: Tensor | None,
    of_cell: Tensor | None,
) -> Tensor:
    """The recursion of back-propagation through time, for K tasks at once."""
    T, N, h = factors.forget.shape
    K = len(next(g for g in (of_outputs, of_state, of_cell) if g is not None))
    state = recurrent.new_zeros(K, N, h) if of_state is None else of_state.reshape(K, N, h)
    cell = recurrent.new_zeros(K, N, h) if of_cell is None else of_cell.reshape(K, N, h)
    # In the order of the kernel's weights: input, forget, cell and output gate.
    at_gates = recurrent.new_empty(K, T, N, 4 * h)
    for t in reversed(range(T)):
        state = state if of_outputs is None else state + of_outputs[:, t]
        cell = torch.addcmul(cell, state, factors.cell_by_state[t])
        parts = [cell * factor[t] for factor in factors.gates] + [state * factors.output_gate[t]]
        torch.cat(parts, dim=-1, out=at_gates[:, t])
        state = product(at_gates[:, t], recurrent)
        cell = cell * factors.forget[t]
    return at_gates


def _samples_first(tensor: Tensor, samples: int) -> Tensor:
    """[..., T, N, features] to [..., B, positions, features]."""
    *head, _, _, features = tensor.shape
    return tensor.transpose(-3, -2).reshape(*head, samples, -1, features)
