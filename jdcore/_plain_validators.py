"""
Validators of attrs fields that hold no tensor.

They are those of :mod:`jdcore.validators` that work without torch, which the specs of plugins do
without.
"""

from __future__ import annotations

import numbers
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from attrs import Attribute

from jdcore.errors import ParameterError, ParameterTypeError

Validator = Callable[[Any, "Attribute[Any]", Any], None]


def integer(minimum: int) -> Validator:
    """An int (not a bool) that is at least ``minimum``, and no larger than an index can be."""

    def validate(_: Any, attribute: Attribute[Any], value: Any) -> None:
        # True is an integer to Python, and numbers of numpy are none of its ints.
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise ParameterTypeError(attribute.name, "an int", repr(value))
        if value < minimum:
            raise ParameterError(attribute.name, f">= {minimum}", value)
        # Larger ones are beyond what torch and numpy take, and some beyond all floats.
        if int(value) > sys.maxsize:
            raise ParameterError(attribute.name, f"<= {sys.maxsize}", _shown(int(value)))

    return validate


def real(
    minimum: float, maximum: float = float("inf"), *, below: float = float("inf")
) -> Validator:
    """A finite real number in [minimum, maximum], and less than ``below``."""
    if below != float("inf"):
        expected = f"in [{minimum}, {below})"
    else:
        bounded = maximum != float("inf")
        expected = f"in [{minimum}, {maximum}]" if bounded else f">= {minimum} and finite"

    def validate(_: Any, attribute: Attribute[Any], value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ParameterTypeError(attribute.name, "a real number", repr(value))
        # Integers of Python may lie beyond all floats, and cannot even be made one then.
        inside = minimum <= value <= maximum and value < below
        if not inside or abs(value) > sys.float_info.max:
            raise ParameterError(attribute.name, expected, _shown(value))

    return validate


def _shown(number: float) -> object:
    if isinstance(number, int) and number.bit_length() > 100:
        return f"an integer of {number.bit_length()} bits"
    return number


def one_of(*options: str) -> Validator:
    """One of the strings given."""

    def validate(_: Any, attribute: Attribute[Any], value: Any) -> None:
        # Of an array, Python could not tell whether it is one of them.
        if not isinstance(value, str) or value not in options:
            expected = f"one of {', '.join(map(repr, options))}"
            raise ParameterError(attribute.name, expected, repr(value))

    return validate


def boolean(_: Any, attribute: Attribute[Any], value: Any) -> None:
    """A bool, or None where None is the default."""
    if not (isinstance(value, bool) or (value is None and attribute.default is None)):
        raise ParameterTypeError(attribute.name, "a bool", repr(value))


def string(pattern: str, expected: str) -> Validator:
    """A string of which the pattern matches the whole, or None where None is the default."""
    compiled = re.compile(pattern)

    def validate(_: Any, attribute: Attribute[Any], value: Any) -> None:
        if value is None and attribute.default is None:
            return
        if not isinstance(value, str):
            raise ParameterTypeError(attribute.name, expected, repr(value))
        # By all of it: `$` would let a line break at the end pass.
        if not compiled.fullmatch(value):
            raise ParameterError(attribute.name, expected, repr(value))

    return validate


def strings(each: Validator, expected: str) -> Validator:
    """A tuple of valid strings. A string alone is refused: it would be taken for its letters."""

    def validate(instance: Any, attribute: Attribute[Any], value: Any) -> None:
        if not isinstance(value, tuple):
            hint = f"Write a tuple: ({value!r},)." if isinstance(value, str) else None
            raise ParameterTypeError(attribute.name, expected, repr(value), hint)
        for item in value:
            each(instance, attribute, item)

    return validate


def notes(_: Any, attribute: Attribute[Any], value: Any) -> None:
    """A mapping of strings to strings."""
    texts = [*value, *value.values()] if isinstance(value, Mapping) else [value]
    if not isinstance(value, Mapping) or not all(isinstance(text, str) for text in texts):
        raise ParameterTypeError(attribute.name, "a mapping of strings to strings", repr(value))


def function(expected: str) -> Validator:
    """Something that can be called."""

    def validate(_: Any, attribute: Attribute[Any], value: Any) -> None:
        if not callable(value):
            raise ParameterTypeError(attribute.name, expected, repr(value))

    return validate
