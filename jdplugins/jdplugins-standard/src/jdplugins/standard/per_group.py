from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import accumulate, pairwise
from typing import Any

import torch
from attrs import Attribute, define, field
from torch import Tensor

from jdcore.aggregation import (
    Columns,
    InformedAggregator,
    aggregator_validator,
    finite_required,
    stateful_part,
    vectors_of,
)
from jdcore.errors import NonFiniteError, ParameterError, ParameterTypeError
from jdcore.protocols import Aggregator
from jdcore.validators import integer, items

State = dict[str, Any]


def _widths(value: Any) -> Any:
    several = None if isinstance(value, (str, Tensor)) else items(value)
    return value if several is None else tuple(several)


def _positive(instance: Any, attribute: Attribute[Any], value: Any) -> None:
    if not isinstance(value, tuple):
        raise ParameterTypeError(attribute.name, "numbers of columns", repr(value))
    for width in value:
        integer(1)(instance, attribute, width)


@define(eq=False)
class PerGroup(InformedAggregator):
    """
    Another method on each group of parameters by itself, such as the layers of a network.

    The columns are cut into groups, and each group is aggregated as if it were alone: objectives
    that conflict in one layer need not conflict in another. What a method guarantees for the update
    of a group (not to conflict, for one) holds for the whole, as inner products add up; optimality
    does not.

    The same can be had by one :func:`jac_to_grad <jdcore.autojac.jac_to_grad>` for each group, with
    an aggregator of its own for each if it has state; here, one aggregator has the state of all.

    Stateful, with one state of the wrapped method for each group.

    :param aggregator: The wrapped :class:`~jdcore.Aggregator`.
    :param columns: Numbers of columns of the first, second, ... group, such as
        ``[sum(p.numel() for p in layer.parameters()) for layer in model]``. Columns that are left
        over make up one more group.

    >>> import torch
    >>> from jdcore.aggregation import MGDA, PerGroup
    >>> matrix = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]])
    >>> PerGroup(MGDA(), columns=[2])(matrix)
    tensor([0.5000, 0.5000, 1.0000])
    """

    aggregator: Aggregator = field(validator=aggregator_validator)
    columns: Sequence[int] = field(converter=_widths, validator=_positive)
    _states: list[State] = field(factory=list, init=False, repr=False)

    def aggregate_parts(self, columns: Columns, losses: Tensor | None) -> tuple[list[Tensor], None]:
        if not columns.rows:
            return columns.filled(0.0), None
        blocks, second = columns.blocks, columns.second
        given = Columns([*blocks, *(second or [])])
        if not given.finite():
            if finite_required(self.check_finite):
                raise NonFiniteError(given.nonfinite_rows())
            return columns.filled(math.nan), None
        pieces: list[list[Tensor]] = [[] for _ in blocks]
        inner = stateful_part(self.aggregator)
        states = []
        groups = self._groups([block.shape[1] for block in blocks])
        for number, group in enumerate(groups):
            if inner is not None:
                self._enter(inner, number)
            parts = [blocks[index][:, cut] for index, cut in group]
            others = None if second is None else [second[index][:, cut] for index, cut in group]
            vectors, _ = vectors_of(self.aggregator, parts, losses, others)
            for (index, _), vector in zip(group, vectors, strict=True):
                pieces[index].append(vector.to(blocks[index].dtype))
            states += [] if inner is None else [inner.state_dict()]
        pairs = zip(blocks, pieces, strict=True)
        vectors = [torch.cat(piece) if piece else b.new_zeros(0) for b, piece in pairs]
        # Only now, so that a call that failed on its way left the state as it was.
        self._states = states
        return vectors, None

    def _enter(self, inner: Any, number: int) -> None:
        """Bring the wrapped method into the state of a group."""
        if number < len(self._states):
            inner.load_state_dict(self._states[number])
        else:
            inner.reset()

    def _groups(self, widths: list[int]) -> list[list[tuple[int, slice]]]:
        """For each group, the blocks that it has columns of, and which."""
        n, wanted = sum(widths), sum(self.columns)
        if wanted > n:
            raise ParameterError(
                "columns", f"of a sum up to {n}, the number of columns of the Jacobian", wanted
            )
        sizes = [*self.columns, n - wanted] if n > wanted else list(self.columns)
        edges = list(pairwise([0, *accumulate(widths)]))
        return [
            [
                (index, slice(max(start, low) - low, min(end, high) - low))
                for index, (low, high) in enumerate(edges)
                if max(start, low) < min(end, high)
            ]
            for start, end in pairwise([0, *accumulate(sizes)])
        ]

    def reset(self) -> None:
        """Return to the state of a new object."""
        self._states = []

    def state_dict(self) -> State:
        """Copy the state: that of the wrapped method for each group, by its number."""
        return {str(number): deepcopy(state) for number, state in enumerate(self._states)}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """
        Restore a state.

        :param state: What :meth:`state_dict` returned, of an object with the same arguments.
        :raises ParameterError: If it does not fit; the state is then left as it was.
        """
        names = [str(number) for number in range(len(state))]
        if not isinstance(state, Mapping) or sorted(state) != sorted(names):
            expected = "a mapping of the groups' numbers to their states"
            raise ParameterError("state", expected, f"the keys {sorted(map(str, state))}")
        inner = stateful_part(self.aggregator)
        if state and inner is None:
            expected = f"empty, as {self.aggregator!r} has no state"
            raise ParameterError("state", expected, f"the keys {names}")
        for name in names if inner is not None else []:
            inner.load_state_dict(state[name])  # type: ignore[union-attr]  # checked just above
        self._states = [deepcopy(state[name]) for name in names]
