from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from jdcore._by_class import ByClass
from jdcore.aggregation._columns import Columns, power
from jdcore.aggregation._nested_state import state_kept
from jdcore.aggregation._observation import Observation, Residuals, observed, told
from jdcore.aggregation._source import ColumnsSource, GramianSource
from jdcore.errors import ParameterError, ParameterTypeError
from jdcore.linalg import unflatten_gramian
from jdcore.validators import describe_tensor, holds_real_numbers

Result = tuple[list[Tensor], Tensor | None]


def as_weighting(given: Any, parameter: str = "weighting") -> Any:
    """
    The weighting that a user means: a weighting, a plain function, or that of an aggregator.

    :param given: A :class:`~jdcore.Weighting`, a :class:`~jdcore.GeneralizedWeighting`, a function
        of the Gramian, or the aggregator of a weighting.
    :param parameter: Name of the argument, for errors.
    :returns: Something that maps a Gramian to weights.
    :raises ParameterTypeError: If it is an aggregator that needs the Jacobian itself, or cannot be
        called with a Gramian.
    """
    part = given
    while hasattr(part, "wrapped"):  # as_module: its forward hooks have to run, so it is kept
        part = part.wrapped
    # Aggregators are callable with a matrix, too: a Gramian would be aggregated as if it were a
    # Jacobian.
    aggregates = hasattr(part, "aggregate_blocks")
    weighting = weighting_of(part) if aggregates else part
    if not callable(weighting) or isinstance(weighting, type):
        raise ParameterTypeError(
            parameter,
            "a Weighting or the aggregator of one",
            repr(given),
            _how_made(given, "weighting")
            or "Methods that need the Jacobian itself: backward, then jac_to_grad.",
        )
    if part is given:
        return weighting
    if aggregates:
        raise ParameterTypeError(
            parameter,
            "a Weighting or the aggregator of one",
            repr(given),
            "Wrap the weighting instead of the aggregator: as_module(aggregator.weighting).",
        )
    return given


def weighting_of(aggregator: Any) -> Any:
    """
    The weighting of an aggregator as a whole; None if it needs the Jacobian itself.

    One that needs it may have an argument of the name ``weighting``, which is a part of it only:
    what it does to the rows before that would be lost.
    """
    if getattr(aggregator, "needs_jacobian", False) or not hasattr(aggregator, "aggregate_blocks"):
        return None
    return getattr(aggregator, "weighting", None)


def check_aggregator(given: Any, parameter: str = "aggregator") -> None:
    """
    Check that something can be an aggregator: one, or a plain function of the Jacobian.

    :param parameter: Name of the argument, for errors.
    :raises ParameterTypeError: If it cannot be called, or is a weighting.
    """
    part = given
    while hasattr(part, "wrapped"):  # as_module
        part = part.wrapped
    if not callable(part) or isinstance(part, type):
        hint = _how_made(given, "aggregator")
        raise ParameterTypeError(parameter, "an Aggregator or a function", repr(given), hint)
    # A weighting is callable with a matrix as well, and would take a square Jacobian for a Gramian.
    if hasattr(part, "weigh") and not hasattr(part, "aggregate_blocks"):
        hint = f"Give the aggregator of this weighting: GramianAggregator({given!r})."
        raise ParameterTypeError(parameter, "an Aggregator or a function", repr(given), hint)


def _how_made(given: object, kind: str) -> str | None:
    """How to make a method of what was given in its place: a class, or the name of one."""
    if isinstance(given, str):
        return f"Look it up: jdcore.get_{kind}({given!r})."
    return f"Make one: {given.__name__}()." if isinstance(given, type) else None


def weigh(weighting: Any, source: GramianSource, shape: Sequence[int] | None = None) -> Tensor:
    """
    Ask a weighting for the weights of a Jacobian.

    :param weighting: As :func:`as_weighting` returns it.
    :param shape: Shape [m1, ..., mk] of the objectives, for a
        :class:`~jdcore.GeneralizedWeighting`; None for a vector of them.
    :returns: Weights of that shape, [m] if None, detached.
    :raises ParameterError: If the weighting returns something else.
    """
    # Without a Gramian there is nothing to see.
    if observed() and source.compute is not None:
        return _watched_weights(weighting, source, shape)
    if shape is not None and len(shape) != 1:
        return checked(_ask_of_shape(weighting, source, shape), tuple(shape))
    takes = _takes_source[ref(type(weighting))]
    weights = weighting.weigh(source) if takes else weighting(_copy(source))
    return checked(weights, (source.rows,))


def _watched_weights(weighting: Any, source: GramianSource, shape: Sequence[int] | None) -> Tensor:
    def observation(weights: Tensor, seconds: float, residuals: Residuals) -> Observation:
        of_rows = unscaled(weights, weighting, source.scale())
        flat = of_rows if of_rows.ndim == 1 else of_rows.flatten()
        return Observation(weighting, source, flat, None, seconds, residuals)

    with state_kept(weighting):  # an observer may fail
        return told(partial(weigh, weighting, source, shape), observation)


def unscaled(weights: Tensor, weighting: Any, scale: float) -> Tensor:
    """
    The weights of the rows of a Jacobian J.

    :param weights: Weights of the rows of ``J / scale``.
    :param weighting: What gave them; its ``scale_degree`` tells how they depend on the scale.
    """
    if scale == 1.0:
        return weights
    half = half_unit(weighting, scale)
    return weights * half * half


def half_unit(weighting: Any, scale: float) -> float:
    """
    The root of what weights of the rows of ``J / scale`` are multiplied by for those of J.

    Two such factors, one for the weights and one for the update, stay in the range of float64 where
    the product does not: for rows of 1e-300, the weights of FairGrad may be 1e400.
    """
    return power(scale, 0.5 * getattr(weighting, "scale_degree", 0))


def combined(
    weighting: Any, columns: Columns, weights: Tensor, scale: float, *, wide: bool
) -> tuple[list[Tensor], Tensor]:
    """
    The update, and the weights of the rows of a Jacobian J.

    :param weighting: As for :func:`unscaled`, as the weights and the scale are.
    :param columns: J, or what else is combined by these weights.
    :param wide: Whether to multiply in float64, whatever the dtypes of the blocks.
    """
    if scale == 1.0:
        return columns.combine(weights, wide=wide), weights
    half = half_unit(weighting, scale)
    vectors = columns.combine(weights * half, wide=wide)
    # Not in float32, where the factor itself may be infinite.
    scaled = [(vector.double() * half).to(vector.dtype) for vector in vectors]
    return scaled, weights * half * half


def _copy(source: GramianSource) -> Tensor:
    # A function may normalize it in place, or differentiate; the Gramian is looked at again.
    return source.gramian().clone()


def checked(weights: Any, expected: tuple[int, ...]) -> Tensor:
    """
    What a weighting returned, detached.

    :param expected: The shape that it is to have.
    :raises ParameterError: If it is something else.
    """
    # What an array becomes as a tensor is told without a call.
    plain = type(weights) is Tensor and weights.is_cpu and weights.dtype is torch.float64
    dense = plain and weights.layout is torch.strided and not weights.is_nested
    if not (dense or holds_real_numbers(weights)) or weights.shape != expected:
        raise ParameterError(
            "weighting",
            f"one that returns real weights of shape {list(expected)}",
            describe_tensor(weights),
            None if isinstance(weights, Tensor) else "Give it as one: torch.as_tensor(weights).",
        )
    tensor: Tensor = weights
    return tensor.detach() if tensor.requires_grad else tensor


def _ask_of_shape(weighting: Any, source: GramianSource, shape: Sequence[int]) -> Any:
    cls = ref(type(weighting))
    if not _takes_source[cls]:
        return weighting(unflatten_gramian(_copy(source), shape))
    if not _takes_shape[cls]:
        raise ParameterError(
            "weighting",
            f"a GeneralizedWeighting, for losses of shape {list(shape)}",
            f"{weighting!r}, for a vector of losses",
            "Make one of it: Flattening(weighting).",
        )
    return weighting.weigh(source, tuple(shape))


@ByClass
def _takes_source(cls: Any) -> bool:
    # A subclass that overrides `__call__` alone means that call, not the `weigh` it inherits.
    for base in cls.__mro__:
        if "weigh" in vars(base):
            return True
        if "__call__" in vars(base):
            return False
    return False


@ByClass
def _takes_shape(cls: Any) -> bool:
    parameters = inspect.signature(cls.weigh).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    # The object itself, the source, and the shape.
    return sum(parameter.kind in positional for parameter in parameters) >= 3


def watched(method: Any, columns: Columns, aggregate: Callable[[], Result]) -> Result:
    """
    Aggregate by a method that is no weighting, and tell the observers of this context.

    :param method: The aggregator that observers hear of; what it calls in turn is not observed.
    :param columns: The Jacobian, of at least one row.
    :param aggregate: Makes the vectors of the blocks, and the weights [m] or None.
    :returns: What ``aggregate`` returns.
    """
    if not observed():
        return aggregate()

    def observation(result: Result, seconds: float, residuals: Residuals) -> Observation:
        vectors, weights = result
        source, update = ColumnsSource(columns), partial(columns.inner, vectors)
        return Observation(method, source, weights, update, seconds, residuals)

    with state_kept(method):  # an observer may fail
        return told(aggregate, observation)
