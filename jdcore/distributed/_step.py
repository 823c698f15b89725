from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from attrs import field, frozen
from torch import Tensor

from jdcore.distributed._meeting import Meeting, Stage, is_same, number_of
from jdcore.errors import ParameterError

Whole: TypeAlias = Callable[..., "tuple[list[Tensor], Tensor | None]"]
"""
Aggregates column blocks that are all in this process.

Takes the aggregator, the blocks, the losses and the blocks of a second batch, or None for these.
Returns one vector for each block, and the weights or None.
"""

Losses: TypeAlias = "Tensor | Sequence[Tensor] | None"


@frozen(eq=False)
class LocalRows:
    """
    The Jacobian that this process has.

    :param matrices: Matrix [m, n] by tensor, of those that have a ``.jac``.
    :param second: The same of a second batch, if there is one.
    """

    matrices: Mapping[Tensor, Tensor]
    second: Mapping[Tensor, Tensor] | None = None

    @property
    def rows(self) -> int | None:
        """Number of rows, None if there is no ``.jac`` here."""
        return next((len(matrix) for matrix in self.matrices.values()), None)


@frozen(eq=False)
class Update:
    """
    What a step is to write, the same on all processes.

    :param gradients: To be added to the ``.grad`` of the tensors.
    :param means: What the ``.grad`` of the tensors becomes: gradients of heads, averaged.
    :param weights: Weights [m] of the rows, None if the aggregator does not tell.
    """

    gradients: Mapping[Tensor, Tensor]
    means: Mapping[Tensor, Tensor] = field(factory=dict)
    weights: Tensor | None = None


def divides(aggregator: Any) -> bool:
    """
    Whether an aggregator can be given columns that lie on several processes.

    Others get all columns on every process, and the result of the first process counts.
    """
    # Asked of the object: a wrapper needs all columns where what it wraps does.
    needs_all = getattr(aggregator, "needs_all_columns", False)
    return hasattr(aggregator, "aggregate_columns") and not needs_all


def no_jacobians(got: str) -> ParameterError:
    """The error where there is nothing to aggregate."""
    return ParameterError(
        "tensors",
        "tensors of which at least one has a .jac",
        got,
        "Call backward or mtl_backward first; jac_to_grad removes .jac unless retain_jac=True.",
    )


def start(
    meeting: Meeting,
    own: LocalRows,
    aggregator: Any,
    words: Callable[[bool], object],
    losses: bool,
    *,
    lacks: bool = False,
) -> tuple[int, bool]:
    """
    Begin a step, if all processes have the same things.

    :param own: What this process has.
    :param words: Words for the tensors of the step. It is called with True where those of the
        processes differ: then, the numbers in copies are to tell these, if there are any.
    :param losses: Whether this process has the values of the losses.
    :param lacks: Whether this process has something to say about single tensors.
    :returns: The number of rows, and whether some process has something to say.
    :raises ParameterError: If rows, tensors, methods or arguments differ, or no process has a
        ``.jac``.
    """
    rows = own.rows
    kinds = [type(aggregator).__name__, type(getattr(aggregator, "weighting", None)).__name__]
    arguments = losses, own.second is None
    number = number_of(words(False), kinds, arguments)
    # One meeting says all that a usual step has to ask: each costs as much as many small layers.
    most, least, one, other, some = meeting.agree(
        Stage.START, rows, None if rows is None else -rows, number, -number, int(lacks)
    )
    if most is None or least is None:
        raise no_jacobians("tensors that have none on any process")
    if not is_same(most, least):
        here = "no rows" if rows is None else f"{rows} rows"
        raise ParameterError(
            ".jac",
            "of the same number of rows on all processes",
            f"{here} here and between {-least} and {most} rows on all",
            "An objective that is absent from the batch of a process is a loss of zero there: see "
            "jdcore.distributed.global_means.",
        )
    if not is_same(one, other):
        _refuse_different(*meeting.agree_on_each(Stage.COPIES, words(True), kinds, arguments))
    return most, bool(some)


def _refuse_different(tensors: bool, methods: bool, arguments: bool) -> None:
    """Raise what tells which things are not the same on all processes, if there are any."""
    if not methods:
        raise ParameterError(
            "aggregator", "of the same class on all processes", "others on some of them"
        )
    if not arguments:
        expected = "given on all processes or on none, as is `second`"
        raise ParameterError("losses", expected, "one of them given on some processes only")
    if not tensors:
        raise ParameterError(
            "tensors",
            "the same tensors in the same order on all processes",
            "others on some of them",
            "Pass all parameters of the model; those without .jac are skipped.",
        )


def mean_losses(meeting: Meeting, losses: Tensor | None) -> Tensor | None:
    """The mean over processes of the values of the objectives."""
    if losses is None:
        return None
    # A copy, as what is reduced is overwritten, and the losses are the user's.
    wide = losses.to(meeting.device, torch.float64, copy=True)
    return (meeting.total(Stage.LOSSES, wide) / meeting.size).to(losses)


def promoted(weights: Tensor | None, tensors: Sequence[Tensor]) -> Tensor | None:
    """Weights in the promoted dtype and on the device of some tensors."""
    if weights is None:
        return None
    dtype = tensors[0].dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    # A copy, which the user may write into: the method may have kept what it gave.
    return weights.to(tensors[0].device, dtype, copy=True)
