from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import ref

from jdcore._by_class import ByClass
from jdcore.aggregation._state import StateFields, state_fields
from jdcore.errors import ParameterError, ParameterTypeError, left_out
from jdcore.protocols import Stateful


class NestedState(StateFields):
    """
    State of an object that holds other methods: its own :func:`state_field` fields, and theirs.

    A subclass says by :meth:`inner_parts` what it holds; the state of each part is under its key.
    """

    __slots__ = ()

    def inner_parts(self) -> dict[str, Any]:
        """The methods that it holds, with or without state, under keys that are no field names."""
        raise left_out(self, "inner_parts")

    def reset(self) -> None:
        """Return to the state of a new object, what it holds included."""
        for part in self._stateful_parts().values():
            part.reset()
        super().reset()

    def state_dict(self) -> dict[str, Any]:
        """Copy the state; the state of what it holds is a dictionary of its own."""
        parts = self._stateful_parts()
        return super().state_dict() | {key: part.state_dict() for key, part in parts.items()}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """
        Restore a state.

        :param state: What :meth:`state_dict` returned, of an object with the same arguments.
        :raises ParameterError: If keys are missing or unknown, or a value does not fit its field;
            the state is then left as it was.
        """
        if not isinstance(state, Mapping):
            raise ParameterTypeError("state", "a mapping, as state_dict() returns", repr(state))
        parts = self._stateful_parts()
        # Before any part takes its state: a missing one would be found halfway.
        for key in parts:
            if not isinstance(state.get(key), Mapping):
                expected = f"a mapping with a state under the key {key!r}"
                raise ParameterError("state", expected, f"the keys {sorted(map(str, state))}")
        # Each part checks and takes its own state, so those before one that refuses have to go
        # back.
        before = self.state_dict()
        try:
            self._load(state, parts)
        except Exception:
            self._load(before, parts)
            raise

    def _load(self, state: Mapping[str, Any], parts: Mapping[str, Stateful]) -> None:
        super().load_state_dict({name: v for name, v in state.items() if name not in parts})
        for key, part in parts.items():
            part.load_state_dict(state[key])

    def _stateful_parts(self) -> dict[str, Stateful]:
        found = {key: stateful_part(part) for key, part in self.inner_parts().items()}
        return {key: part for key, part in found.items() if part is not None}


def stateful_part(method: Any) -> Stateful | None:
    """The outermost part of a method that has state: adapters delegate to what they hold."""
    while method is not None:
        method = getattr(method, "wrapped", method)
        if _is_stateful[ref(type(method))]:
            part: Stateful = method
            return part
        method = getattr(method, "weighting", None)
    return None


@ByClass
def stateless(cls: Any) -> bool:
    """Whether :func:`stateful_part` finds nothing in any object of a class."""
    held = ("wrapped", "weighting", "__getattr__")
    return not (cls.__dictoffset__ or _is_stateful[ref(cls)] or any(hasattr(cls, n) for n in held))


@ByClass
def _is_stateful(cls: Any) -> bool:
    # Asked in every step: a comparison of each object with the protocol takes as long as to weigh.
    return all(hasattr(cls, name) for name in ("reset", "state_dict", "load_state_dict"))


@contextmanager
def state_kept(method: Any) -> Iterator[Callable[[], None]]:
    """
    Restore the state of a method, and of what it holds, if a ``with`` block fails.

    For steps that may fail after they have asked the method, be it on another process. The block
    gets what restores it, for a step that ends without an error and yet counts for nothing.

    :param method: A weighting or aggregator, with or without state.
    """
    part = stateful_part(method)
    restore = _nothing if part is None else restorer(part)
    try:
        yield restore
    except BaseException:
        restore()
        raise


def _nothing() -> None:
    """Restore the state of a method that has none."""


def restorer(part: Stateful) -> Callable[[], None]:
    """What brings a method back into its present state."""
    if type(part).state_dict not in (StateFields.state_dict, NestedState.state_dict):
        return partial(part.load_state_dict, part.state_dict())
    # Values, not copies, which may be as large as a Jacobian: state is replaced, never modified.
    values = {state.name: getattr(part, state.name) for state in state_fields(type(part))}
    inner = part._stateful_parts().values() if isinstance(part, NestedState) else ()
    return partial(_restore, part, values, [restorer(each) for each in inner])


def _restore(part: Stateful, values: Mapping[str, Any], others: list[Callable[[], None]]) -> None:
    for name, value in values.items():
        setattr(part, name, value)
    for other in others:
        other()
