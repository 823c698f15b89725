from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from jdcore.aggregation._source import taken_by
from jdcore.errors import ParameterTypeError
from jdcore.protocols import Aggregator, GeneralizedWeighting, Stateful, Weighting


class AggregationModule(torch.nn.Module):
    """
    A weighting or aggregator as a module; made by :func:`as_module`.

    :param wrapped: The weighting or aggregator, under ``.wrapped`` ever after.
    """

    def __init__(self, wrapped: Any) -> None:
        super().__init__()
        self.wrapped = wrapped

    def forward(self, tensor: Tensor, /, **known: Any) -> Tensor:
        """
        Call the wrapped object: a Jacobian to an update, or a Gramian to weights.

        :param known: What the wrapped object may need beside it, such as ``losses``. It is given
            what it takes.
        """
        result: Tensor = self.wrapped(tensor, **taken_by(self.wrapped, **known))
        return result

    def extra_repr(self) -> str:
        return "" if isinstance(self.wrapped, torch.nn.Module) else repr(self.wrapped)

    # `to`, `cuda`, `half` and the like all come down to this method of torch, which has no public
    # hook.
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AggregationModule:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # untyped in torch
        for part in _chain(self.wrapped):
            _move_arguments(part, fn)
        return self


class StatefulAggregationModule(AggregationModule):
    """
    An :class:`AggregationModule` whose ``state_dict()`` carries the state of what it wraps.

    :param wrapped: The weighting or aggregator.
    """

    def get_extra_state(self) -> dict[str, Any]:
        """Give the state to ``state_dict()``, under the key ``_extra_state``."""
        return _stateful_part(self.wrapped).state_dict()

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """
        Take the state back in ``load_state_dict()``.

        :raises ParameterError: If it does not fit; the state is then left as it was.
        """
        _stateful_part(self.wrapped).load_state_dict(state)


def as_module(wrapped: Aggregator | Weighting | GeneralizedWeighting, /) -> AggregationModule:
    """
    Wrap a weighting or aggregator as a :class:`torch.nn.Module`.

    For forward hooks, and to have the state of a :class:`~jdcore.Stateful` method in the checkpoint
    of the model it is an attribute of. ``.to(...)`` moves tensors given as arguments, such as
    preference vectors.

    :param wrapped: Any weighting or aggregator, also a plain function.
    :returns: A module whose call is that of ``wrapped``, which it has as ``.wrapped``.
    :raises ParameterTypeError: If ``wrapped`` cannot be called.

    >>> import torch
    >>> from jdcore.aggregation import Sum, as_module
    >>> module = as_module(Sum())
    >>> module
    AggregationModule(Sum())
    >>> module(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([4., 6.])
    """
    if not callable(wrapped):
        raise ParameterTypeError("wrapped", "a weighting or an aggregator", repr(wrapped))
    stateful = any(map(_is_stateful, _chain(wrapped)))
    return StatefulAggregationModule(wrapped) if stateful else AggregationModule(wrapped)


def _is_stateful(part: Any) -> bool:
    # A wrapped module is a submodule already, so its state_dict() is part of the outer one.
    return isinstance(part, Stateful) and not isinstance(part, torch.nn.Module)


def _stateful_part(wrapped: Any) -> Stateful:
    part: Stateful = next(part for part in _chain(wrapped) if _is_stateful(part))
    return part


def _chain(part: Any) -> list[Any]:
    """The object and what it delegates to, under the names ``weighting`` and ``aggregator``."""
    parts: list[Any] = []
    # By identity: wrappers may be equal, and may refer to one another.
    while part is not None and not any(part is seen for seen in parts):
        parts.append(part)
        part = getattr(part, "weighting", None) or getattr(part, "aggregator", None)
    return parts


def _move_arguments(part: Any, fn: Callable[[Tensor], Tensor]) -> None:
    if not attrs.has(type(part)):
        return
    for argument in attrs.fields(type(part)):
        value = getattr(part, argument.name)
        # Arguments only: state is brought to where it is needed by the next call.
        if argument.init and isinstance(value, Tensor):
            setattr(part, argument.name, fn(value))
