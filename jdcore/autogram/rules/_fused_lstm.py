"""
One layer of an LSTM in one direction, as the fused kernel of torch runs it on CPUs in float32.

The kernel keeps its gates to itself, so they are computed once more, for all steps in one product:
the states before each step are those that it returned. What is left to do step by step is the
backward recursion, which gives the gradients at the gates; with these the weights are those of
linear layers over T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from attrs import frozen
from torch import Tensor
from torch.nn import Parameter

from jdcore.autogram._call import widened
from jdcore.autogram.blocks import Block, OuterBlock
from jdcore.graph import saved

FUSED_LSTM = "MkldnnRnnLayerBackward0"

OUTPUTS = (0, 1, 2)
"""Results of the operation: all hidden states [T, N, h], the last one and the last cell [N, h]."""

OPERANDS = (1, 2, 3, 4)
"""Positions of the input weight, the hidden weight and their biases."""

_LSTM_MODE = 2


@frozen(eq=False)
class Gates:
    """
    What multiplies the weights, and the gradients there.

    :param inputs: Shape [T, N, i].
    :param states: Hidden states before each step, shape [T, N, h].
    :param grads: Gradients of all tasks at the gates, shape [K, T, N, 4 h].
    """

    inputs: Tensor
    states: Tensor
    grads: Tensor

    def block(self, parameter: Parameter, position: int, samples: int) -> Block:
        """The Jacobian with respect to one operand, with B samples that are the N sequences."""
        grads = _samples_first(self.grads, samples)
        if position > 2:
            nothing = grads.new_empty(*grads.shape[1:3], 0)
            return OuterBlock(None, parameter, nothing, grads)
        inputs = self.inputs if position == 1 else self.states
        return OuterBlock(parameter, None, _samples_first(inputs, samples), grads)


def samples_apart(layouts: Sequence[str | None], samples: int) -> bool:
    """Whether the samples are the sequences, by the layouts at :data:`OUTPUTS` (None: unused)."""
    expected = ("second", "major", "major")
    pairs = zip(layouts, expected, strict=True)
    return samples == 1 or all(found in (None, wanted) for found, wanted in pairs)


def gates_of(node: Any, grads: Sequence[Tensor | None]) -> Gates | None:
    """
    Compute the gates again, and the gradients there.

    :param node: The operation.
    :param grads: Gradients of K tasks at :data:`OUTPUTS`, None where there are none.
    :returns: None if the operation is no LSTM.
    :raises Unreadable: If torch does not show what the operation saved.
    """
    if saved(node, "mode") != _LSTM_MODE:
        return None
    kinds = ["weight0", "weight1", "weight2", "weight3"][: 4 if saved(node, "has_biases") else 2]
    weights = [_plain(saved(node, kind)) for kind in kinds]
    inputs, outputs = _plain(saved(node, "input")), _plain(saved(node, "result0"))
    of_outputs, of_state, of_cell = (None if g is None else widened(g) for g in grads)
    if saved(node, "reverse"):
        inputs, outputs = inputs.flip(0), outputs.flip(0)
        of_outputs = None if of_outputs is None else of_outputs.flip(1)
    states = torch.cat([_plain(saved(node, "hx_")).reshape(1, *outputs.shape[1:]), outputs[:-1]])
    gates = inputs @ weights[0].T + states @ weights[1].T
    for bias in weights[2:]:
        gates += bias
    factors = _factors(gates, _plain(saved(node, "cx_")).reshape(outputs.shape[1:]))
    at_gates = _backward(factors, weights[1], of_outputs, of_state, of_cell)
    return Gates(inputs, states, at_gates)


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
    at_gates = recurrent.new_empty(K, T, N, 4 * h)
    for t in reversed(range(T)):
        state = state if of_outputs is None else state + of_outputs[:, t]
        cell = torch.addcmul(cell, state, factors.cell_by_state[t])
        parts = [cell * factor[t] for factor in factors.gates] + [state * factors.output_gate[t]]
        torch.cat(parts, dim=-1, out=at_gates[:, t])
        state = at_gates[:, t] @ recurrent
        cell = cell * factors.forget[t]
    return at_gates


def _plain(tensor: Tensor) -> Tensor:
    plain: Tensor = widened(tensor.detach())
    return plain


def _samples_first(tensor: Tensor, samples: int) -> Tensor:
    """[..., T, N, features] to [..., B, positions, features]."""
    *head, _, _, features = tensor.shape
    return tensor.transpose(-3, -2).reshape(*head, samples, -1, features)
