from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import attrs
from attrs import frozen

from jdcore._methods import ComposedAggregator
from jdcore.aggregation import Flattening, GramianAggregator
from jdcore.errors import ParameterError

ADAPTERS: dict[str, type] = {"flattening": Flattening, "gramian_aggregator": GramianAggregator}
"""Classes of the core that wrap a method, by the name they have in a configuration."""

_UNION = re.compile(r"^(?:typing\.)?(?:Optional|Union)\[(.*)\]$")


@frozen
class Argument:
    """
    One argument of a constructor.

    :param name: What the constructor calls it.
    :param attribute: Where the object keeps it.
    :param default: Its default, or ``inspect.Parameter.empty``.
    :param hint: Its annotation: a type, or the source text of one.
    :param problem: The problem whose solver it is, if it is one (see
        :func:`~jdcore.aggregation.solver_field`).
    """

    name: str
    attribute: str
    default: Any
    hint: Any
    problem: str | None = None

    def of(self, owner: Any) -> Any:
        """
        The value that an object was made with, or was set later.

        :raises ParameterError: If it is kept elsewhere, as may be where a class is not attrs.
        """
        try:
            return getattr(owner, self.attribute)
        except AttributeError:
            where = f"kept in an attribute of this name by {type(owner).__name__}"
            raise ParameterError(self.name, where, "an object without one") from None

    def accepts(self, type_name: str) -> bool:
        """
        Whether the annotation is a type of this name, or a union with one.

        By its text: annotations may refer to names that exist for type checkers only, so that
        evaluating them fails.
        """
        hint = self.hint.__name__ if isinstance(self.hint, type) else str(self.hint)
        members = _UNION.sub(r"\1", hint).replace(",", "|").split("|")
        return any(member.strip().rpartition(".")[2] == type_name for member in members)


def arguments_of(cls: Any) -> dict[str, Argument]:
    """
    The arguments of a method's constructor, by name.

    :raises ParameterError: If one of them is called ``name``, the key of the method itself.
    """
    if issubclass(cls, ComposedAggregator):
        # Its own constructor passes on whatever it is given.
        cls = cls.weighting_class
    arguments = _of_attrs(cls) if attrs.has(cls) else _of_signature(cls)
    found = {argument.name: argument for argument in arguments}
    if "name" in found:
        raise ParameterError(
            "name", "the method itself in a configuration", f"an argument of {cls.__name__}"
        )
    return found


def _of_attrs(cls: Any) -> Iterator[Argument]:
    for field in attrs.fields(cls):
        if field.init:
            problem = field.metadata.get("jdcore.problem")
            yield Argument(field.alias, field.name, _default(field), field.type, problem)


def _default(field: attrs.Attribute[Any]) -> Any:
    if field.default is attrs.NOTHING:
        return inspect.Parameter.empty
    # A default that depends on other arguments equals no value, so it is always written out.
    factory = getattr(field.default, "factory", None)
    if factory is None:
        return field.default
    return object() if field.default.takes_self else factory()  # type: ignore[union-attr]


def _of_signature(cls: Any) -> Iterator[Argument]:
    for name, parameter in inspect.signature(cls).parameters.items():
        # Where a class that is not attrs keeps an argument is not written down: by its name,
        # as is the custom.
        yield Argument(name, name, parameter.default, parameter.annotation)
