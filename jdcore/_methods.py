"""
The classes of the registered methods.

The registry knows specs; here they become classes. This module stands above the registry and above
:mod:`jdcore.aggregation`, because the aggregator of a weighting is composed of both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from jdcore._catalogue import distribution_of
from jdcore._discovery import AGGREGATOR, SCALARIZER, Kind
from jdcore._registry import load_class, registry, signature_of
from jdcore._tables import Entry
from jdcore.aggregation._aggregator import GramianAggregator
from jdcore.aggregation._weigh import as_weighting
from jdcore.errors import (
    AmbiguousNameError,
    MissingMethodError,
    ParameterError,
    ParameterTypeError,
    UnknownNameError,
)
from jdcore.protocols import Weighting
from jdcore.spec import normalize_name
from jdcore.validators import describe_tensor

_COMPOSED: dict[str, type[ComposedAggregator]] = {}
"""The composed class of each method, by its qualified name."""

_STATEFUL_METHODS = ("reset", "state_dict", "load_state_dict")


def aggregator_class(name: str) -> type:
    """
    The class of an aggregator: the plugin's own, or one composed from its weighting.

    Errors as :func:`jdcore.get_aggregator`.
    """
    entry = registry.entry(AGGREGATOR, name)
    if entry.spec.aggregator is not None:
        return load_class(entry, entry.spec.aggregator)
    weighting = load_class(entry, entry.spec.weighting)
    return _composed(entry.spec.class_name, entry.qualified_name, weighting)


def weighting_class(name: str) -> type:
    """
    The class of a weighting.

    :raises ParameterError: If the method is not a weighting of the Gramian.
    """
    entry = registry.entry(AGGREGATOR, name)
    if entry.spec.weighting is None:
        raise ParameterError(
            "name",
            "a method whose weights depend on the Gramian only",
            repr(name),
            f"{entry.spec.class_name} has to see the matrix: use get_aggregator({name!r}).",
        )
    return load_class(entry, entry.spec.weighting)


def mixes_rows(name: str) -> bool:
    """Whether a method combines the rows for a method that it wraps."""
    spec = registry.entry(AGGREGATOR, name).spec
    return bool(spec.wrapper and spec.weighting is None)


def scalarizer_class(name: str) -> type:
    """The class of a scalarizer. Errors as :func:`jdcore.get_scalarizer`."""
    entry = registry.entry(SCALARIZER, name)
    return load_class(entry, entry.spec.scalarizer)


def exported_class(kind: Kind, class_name: str) -> type:
    """
    The class that ``jdcore.aggregation`` or ``jdcore.scalarization`` exports under this name.

    :raises AttributeError: If no method has this class name, or it has no weighting of a Gramian
        (so that ``hasattr`` works).
    :raises MissingMethodError: If a known distribution that is not installed provides it.
    :raises AmbiguousNameError: If several distributions provide it.
    """
    if kind is SCALARIZER:
        return scalarizer_class(_exported(kind, class_name, class_name).qualified_name)
    # A spec has one class name, that of the aggregator, from which the other one follows.
    base = class_name.removesuffix("Weighting")
    name = _exported(kind, base, class_name).qualified_name
    if class_name == base:
        return aggregator_class(name)
    try:
        return weighting_class(name)
    except ParameterError as error:
        raise AttributeError(str(error), name=class_name) from None


def _exported(kind: Kind, class_name: str, asked: str) -> Entry:
    found = [e for e in registry.entries(kind) if e.spec.class_name == class_name]
    # Another method of the same class name, such as one of a notebook, takes it from nobody.
    called_so = [e for e in found if normalize_name(e.spec.name) == normalize_name(class_name)]
    found = called_so or found
    # An import is like a plain name: it belongs to nobody where two distributions claim it.
    if len({entry.distribution for entry in found}) > 1:
        raise AmbiguousNameError(asked, kind.word, [entry.qualified_name for entry in found])
    if found:
        return found[0]
    try:
        spec = registry.entry(kind, class_name).spec
    except UnknownNameError as error:
        if distribution_of(class_name, kind=kind.word) is None:
            raise AttributeError(str(error), name=asked) from error
        raise MissingMethodError(asked, error.kind, error.close, error.known, error.hint) from None
    # The registry finds names in any spelling; an import has one.
    raise AttributeError(
        f"no {kind.word} has the class name {class_name!r}; did you mean {spec.class_name!r}?",
        name=asked,
    )


def exported_names(kind: Kind) -> list[str]:
    """The names of all classes of registered methods or scalarizers."""
    specs = [entry.spec for entry in registry.entries(kind)]
    weighted = [spec for spec in specs if getattr(spec, "weighting", None) is not None]
    return [spec.class_name for spec in specs] + [f"{s.class_name}Weighting" for s in weighted]


class ComposedAggregator(GramianAggregator):
    """Base of the classes made by :func:`compose`; they take the arguments of their weighting."""

    # As all methods: a misspelt attribute is an error.
    __slots__ = ()

    weighting_class: ClassVar[type]
    qualified_name: ClassVar[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(self.weighting_class(*args, **kwargs))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weighting":
            self._check_weighting(value)
        # Subclasses may set what is their own before they call the constructor.
        elif hasattr(getattr(self, "weighting", None), name):
            raise AttributeError(f"set it on the weighting: aggregator.weighting.{name} = ...")
        super().__setattr__(name, value)

    def _check_weighting(self, value: Any) -> None:
        # The class tells what method this is, also to pickle and to configurations.
        if type(as_weighting(value)) is not self.weighting_class:
            expected = f"of class {self.weighting_class.__name__}"
            hint = "Make another aggregator: GramianAggregator(weighting)."
            raise ParameterTypeError("weighting", expected, describe_tensor(value), hint)

    def __repr__(self) -> str:
        # What one would type: this class takes the arguments of its weighting.
        arguments = repr(self.weighting).partition("(")[2]
        return f"{type(self).__name__}({arguments}"

    def __reduce__(self) -> tuple[Any, ...]:
        cls = type(self)
        # By qualified name: the short name may belong to nobody where two distributions claim it.
        if is_composed(cls):
            return _restore, (self.qualified_name, self.weighting)
        slots = [n for base in cls.__mro__ for n in vars(base).get("__slots__", ())]
        values = {n: getattr(self, n) for n in slots if n != "__weakref__" and hasattr(self, n)}
        return _restore_subclass, (cls, values | getattr(self, "__dict__", {}))


class _StatefulComposedAggregator(ComposedAggregator):
    """Composed of a :class:`~jdcore.Stateful` weighting, which keeps the state."""

    __slots__ = ()

    weighting: Any

    def reset(self) -> None:
        """Return to the state of a new object."""
        self.weighting.reset()

    def state_dict(self) -> dict[str, Any]:
        """Copy the state, which is that of ``.weighting``."""
        state: dict[str, Any] = self.weighting.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """
        Restore a state.

        :param state: What :meth:`state_dict` returned, here or of ``.weighting``.
        :raises ParameterError: If it does not fit; the state is then left as it was.
        """
        self.weighting.load_state_dict(state)


def compose(
    class_name: str, weighting_class: type, qualified_name: str
) -> type[ComposedAggregator]:
    """
    Make the aggregator class of a weighting class.

    :param class_name: Name of the new class, e.g. ``"UPGrad"``.
    :param weighting_class: Class of the weighting; its docstring and signature are taken over.
    :param qualified_name: ``"distribution:name"``, under which the registry finds the class again.
    """
    namespace = {
        "__slots__": (),
        "__doc__": weighting_class.__doc__,
        "__module__": "jdcore.aggregation",
        # Editors and `jdcore info` ask it, where `*args, **kwargs` would tell nothing.
        "__signature__": signature_of(weighting_class),
        "weighting_class": weighting_class,
        "qualified_name": qualified_name,
    }
    # The protocol's own check would need an instance before Python 3.12.
    stateful = all(hasattr(weighting_class, name) for name in _STATEFUL_METHODS)
    base = _StatefulComposedAggregator if stateful else ComposedAggregator
    # A real class, not a function that makes one: for isinstance, subclasses and `help`.
    return type(class_name, (base,), namespace)


def is_composed(cls: type) -> bool:
    """Whether :func:`compose` made a class; its subclasses are other methods."""
    return issubclass(cls, ComposedAggregator) and "qualified_name" in vars(cls)


def _composed(class_name: str, qualified_name: str, weighting_class: type) -> type:
    # The composed class stays the same object until a notebook cell that runs again redefines its
    # weighting: the old one is let go then.
    known = _COMPOSED.get(qualified_name)
    if known is None or (known.__name__, known.weighting_class) != (class_name, weighting_class):
        known = _COMPOSED[qualified_name] = compose(class_name, weighting_class, qualified_name)
    return known


def _restore_subclass(cls: Any, values: Mapping[str, Any]) -> Any:
    restored = cls.__new__(cls)
    for name, value in values.items():
        object.__setattr__(restored, name, value)
    return restored


def _restore(qualified_name: str, weighting: Weighting) -> ComposedAggregator:
    cls: type[ComposedAggregator] = aggregator_class(qualified_name)
    # Around the weighting that was pickled, which its own constructor would make anew.
    aggregator = cls.__new__(cls)
    GramianAggregator.__init__(aggregator, weighting)
    return aggregator
