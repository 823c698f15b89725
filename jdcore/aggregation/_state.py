from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from attrs import Attribute, field
from torch import Tensor

from jdcore.errors import ParameterError, ParameterTypeError
from jdcore.validators import Validator, describe_tensor

_INITIAL = "jdcore.initial_state"


def state_field(initial: Callable[[], Any], *, validator: Validator | None = None) -> Any:
    """
    An attrs field that holds state: no argument of the constructor, and not part of the ``repr``.

    :param initial: Makes the value of a new object: a Tensor or a plain number. For "nothing yet"
        choose an empty Tensor of as many dimensions as later values have.
    :param validator: Attrs validator of values that are restored. It is not run at each step, where
        it would cost time, as what a method assigns itself is right.
    """
    return field(
        factory=initial,
        init=False,
        repr=False,
        validator=validator,
        on_setattr=attrs.setters.NO_OP,
        metadata={_INITIAL: initial},
    )


class StateFields:
    """
    Makes an attrs class :class:`~jdcore.Stateful`: its state is its :func:`state_field` fields.

    Methods assign new values to these fields as their last step, so that a call that fails leaves
    the state as it was, and never change a Tensor in place.

    >>> import torch
    >>> from attrs import define
    >>> from jdcore.aggregation import StateFields, state_field
    >>> @define(eq=False)
    ... class Counter(StateFields):
    ...     calls: int = state_field(int)
    ...     def __call__(self, matrix):
    ...         self.calls += 1
    ...         return matrix.sum(dim=0)
    >>> first, second = Counter(), Counter()
    >>> first(torch.ones(2, 3))
    tensor([2., 2., 2.])
    >>> second.load_state_dict(first.state_dict())
    >>> second.state_dict()
    {'calls': 1}
    """

    __slots__ = ()

    def reset(self) -> None:
        """Return to the state of a new object."""
        for state in state_fields(type(self)):
            setattr(self, state.name, state.metadata[_INITIAL]())

    def state_dict(self) -> dict[str, Any]:
        """Copy the state: tensors and plain numbers by field name."""
        values = {state.name: getattr(self, state.name) for state in state_fields(type(self))}
        # Clones, so that whoever loads a checkpoint into another object shares no tensor with this
        # one.
        return {n: v.clone() if isinstance(v, Tensor) else v for n, v in values.items()}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """
        Restore a state.

        :param state: What :meth:`state_dict` returned, of an object with the same arguments.
        :raises ParameterError: If keys are missing or unknown, or a value does not fit its field
            or holds NaN; the state is then left as it was.
        """
        fields = state_fields(type(self))
        _check_keys(state, [f.name for f in fields])
        # All values are checked before the first one is set.
        restored = {f.name: _restore(self, f, state[f.name]) for f in fields}
        for name, value in restored.items():
            setattr(self, name, value)


def state_fields(cls: Any) -> tuple[Attribute[Any], ...]:
    """The :func:`state_field` fields of an attrs class."""
    return tuple(f for f in attrs.fields(cls) if _INITIAL in f.metadata)


def _check_keys(state: Mapping[str, Any], names: list[str]) -> None:
    if not isinstance(state, Mapping):
        raise ParameterTypeError("state", "a mapping, as state_dict() returns", repr(state))
    if set(state) != set(names):
        expected = f"a mapping with the keys {sorted(names)}"
        raise ParameterError("state", expected, f"the keys {sorted(map(str, state))}")


def _restore(owner: object, state: Attribute[Any], value: Any) -> Any:
    # The kind is that of a new object, since the present value may be of another size.
    current = state.metadata[_INITIAL]()
    restored = (
        _restore_tensor(state.name, current, value)
        if isinstance(current, Tensor)
        else _restore_number(state.name, current, value)
    )
    if state.validator is not None:
        state.validator(owner, state, restored)
    return restored


def _restore_tensor(name: str, current: Tensor, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise ParameterTypeError(name, "a Tensor", describe_tensor(value))
    dense = value.layout == torch.strided and value.device.type != "meta"
    if not dense or not torch.can_cast(value.dtype, current.dtype):
        kind = str(current.dtype).removeprefix("torch.")
        raise ParameterError(name, f"a dense Tensor that {kind} can hold", describe_tensor(value))
    if value.ndim != current.ndim:
        raise ParameterError(name, f"a Tensor of {current.ndim} dimensions", describe_tensor(value))
    # A checkpoint read with another map_location, or rounded by .half(), fits all the same.
    restored = value.detach().to(device=current.device, dtype=current.dtype, copy=True)
    _check_range(name, current, restored)
    return restored


def _check_range(name: str, current: Tensor, value: Tensor) -> None:
    """
    Refuse NaN, which no call leaves in a state, and infinity where a new object has none.

    :raises ParameterError: If there are such entries.
    """
    if bool(value.isnan().any()):
        raise ParameterError(name, "free of NaN", "NaN")
    if bool(value.isinf().any()) and not bool(current.isinf().any()):
        raise ParameterError(name, "finite", "infinite entries")


def _restore_number(name: str, current: Any, value: Any) -> Any:
    kind = type(current)
    # Numbers of numpy, as some loaders of checkpoints give, are real without being floats.
    accepted = numbers.Real if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise ParameterTypeError(name, f"a plain {kind.__name__}", repr(value))
    try:
        restored = kind(value)
    except OverflowError as error:
        raise ParameterError(name, f"in the range of {kind.__name__}", str(error)) from error
    if kind is float:
        initial, value = torch.tensor([current, restored], dtype=torch.float64, device="cpu")
        _check_range(name, initial, value)
    return restored
