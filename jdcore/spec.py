"""
Declarative descriptions of what plugins provide.

A spec is plain data: listing, documentation tables, error texts and conformance tests are generated
from it, and no method or solver is imported before it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from types import MappingProxyType
from typing import Any

from attrs import Attribute, field, frozen

from jdcore._plain_validators import boolean, function, integer, notes, string, strings
from jdcore.errors import ParameterError, ParameterTypeError

__all__ = [
    "API_VERSION",
    "AggregatorSpec",
    "GramianRuleSpec",
    "Property",
    "Reference",
    "ScalarizerSpec",
    "SolverSpec",
    "normalize_name",
]

API_VERSION = 1
"""Version of the plugin interface. A plugin states the version it was written for in every spec."""


def normalize_name(name: str) -> str:
    """Key under which a name is found: "NashMTL", "nash-mtl" and "nash_mtl" are the same."""
    return name.replace("-", "").replace("_", "").lower()


class Property(Enum):
    """
    Mathematical properties a method may declare; the conformance suite checks what is declared.

    The first three are those of `Jacobian Descent for Multi-Objective Optimization
    <https://arxiv.org/pdf/2406.16232>`_, section 2.2.
    """

    NON_CONFLICTING = "non_conflicting"
    """The update has a non-negative inner product with every row."""

    LINEAR_UNDER_SCALING = "linear_under_scaling"
    """For every J, ``c -> A(diag(c) J)`` is linear over positive vectors c."""

    STRONGLY_STATIONARY = "strongly_stationary"
    """``A(J) = 0`` only if some strictly positive combination of the rows is zero."""

    PERMUTATION_INVARIANT = "permutation_invariant"
    """The update does not depend on the order of the rows."""

    SCALE_EQUIVARIANT = "scale_equivariant"
    """``A(s J) = s A(J)`` for every s > 0."""

    ROBUST = "robust"
    """
    With the example arguments one adversarial row, wherever it is, moves the update nowhere else
    than into the ball around the mean of the other rows whose radius is twice the largest distance
    of one of them. There are at least five rows, and the adversary is the last one.
    """

    DIFFERENTIABLE = "differentiable"
    """``A`` can be differentiated with respect to J."""


_identifier = r"[^\W\d]\w*"
_factory = rf"{_identifier}(\.{_identifier})*:{_identifier}"

_text = string(r"\S|\S.*\S", "one line of text")
_valid_name = string(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", "a lower snake case name such as 'nash_mtl'")
_valid_factory = string(_factory, "a 'module:attribute' string")
_operation = string(
    rf"{_factory}|\w+Backward\w*",
    "a 'module:attribute' string or the name of a node, such as 'CdistBackward0'",
)
_aliases = strings(_valid_name, "a tuple of names")
_requires = strings(
    string(
        r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?",
        "the name of a distribution such as 'scipy', without a version",
    ),
    "a tuple of names of distributions",
)
_method = string(_identifier, "the name of a method of the class, or None")
_url = string(r"https?://\S+", "an address that starts with 'https://' or 'http://'")
_example = function("a function that makes keyword arguments for m rows, given m")


def _api_version(_: Any, attribute: Attribute[Any], value: Any) -> None:
    # True == 1 in Python.
    if isinstance(value, bool) or value != API_VERSION:
        raise ParameterError(
            attribute.name,
            f"{API_VERSION}, the plugin interface of this jdcore",
            repr(value),
            "Install a release of the plugin that matches this jdcore, or upgrade jdcore.",
        )


def _reference(_: Any, attribute: Attribute[Any], value: Any) -> None:
    if not (value is None or isinstance(value, Reference)):
        raise ParameterTypeError(attribute.name, "a Reference or None", repr(value))


def _all_properties(_: Any, attribute: Attribute[Any], value: Any) -> None:
    if not isinstance(value, frozenset):
        hint = "Write jdcore.Property.NON_CONFLICTING and the like."
        raise ParameterTypeError(attribute.name, "a set of Property members", repr(value), hint)


# Converters leave alone what they cannot convert: the validator of the field refuses it by name.


def _properties(values: Any) -> Any:
    items = _strings(values)
    known = isinstance(items, tuple) and all(isinstance(item, Property) for item in items)
    return frozenset(items) if known else items


def _strings(values: Any) -> Any:
    return values if isinstance(values, str) or not isinstance(values, Iterable) else tuple(values)


def _read_only(value: Any) -> Any:
    # A copy, so that the caller's dictionary does not change a frozen spec later.
    return MappingProxyType(dict(value)) if isinstance(value, Mapping) else value


def _no_arguments(m: int) -> dict[str, Any]:
    del m
    return {}


@frozen(kw_only=True)
class Reference:
    """The publication of a method: title, year, and a stable address."""

    title: str = field(validator=_text)
    year: int = field(validator=integer(1))
    url: str = field(validator=_url)


@frozen(kw_only=True)
class _MethodSpec:
    """What the specs of aggregators and of scalarizers have in common."""

    name: str = field(validator=_valid_name)
    summary: str = field(validator=_text)
    api_version: int = field(validator=_api_version)
    reference: Reference | None = field(default=None, validator=_reference)
    stateful: bool = field(default=False, validator=boolean)
    stochastic: bool = field(default=False, validator=boolean)
    requires: tuple[str, ...] = field(default=(), converter=_strings, validator=_requires)
    aliases: tuple[str, ...] = field(default=(), converter=_strings, validator=_aliases)
    example: Callable[[int], Mapping[str, Any]] = field(default=_no_arguments, validator=_example)
    expected_failures: Mapping[str, str] = field(
        factory=dict, converter=_read_only, validator=notes
    )


@frozen(kw_only=True)
class AggregatorSpec(_MethodSpec):
    """
    Everything jdcore knows of a method before importing it.

    Give ``weighting`` for a method whose weights depend on the Gramian only: its aggregator is then
    composed from it, and it works with autojac and autogram alike. Give ``aggregator`` for a method
    that has to see single coordinates.

    :param name: Registry name, lower snake case.
    :param summary: One line that says what the method does.
    :param weighting: ``"module:attribute"`` of the weighting class, whose name is the class name of
        the method followed by ``Weighting``.
    :param aggregator: ``"module:attribute"`` of the aggregator class.
    :param reference: The publication; None for methods that are common knowledge.
    :param properties: What the method guarantees, checked by the conformance suite.
    :param losses: Whether the method looks at the values of the losses too, which a caller then has
        to give (see :class:`~jdcore.aggregation.LossWeighting`).
    :param cross_gramian: Whether the weighting looks at the cross-Gramian of two independent
        batches in place of the Gramian (see :class:`~jdcore.aggregation.CrossGramianWeighting`).
    :param wrapper: Whether it changes what another method does, which is its argument
        ``weighting`` (or ``aggregator``, if it has to see the matrix).
    :param stateful: Whether results depend on earlier calls (see :class:`~jdcore.Stateful`).
    :param stochastic: Whether results depend on a random generator (argument ``generator``).
    :param min_rows: Smallest number of rows the method is defined for, at its example arguments;
        fewer rows (but not zero) raise a ParameterError.
    :param requires: Names of the distributions needed beyond torch and numpy.
    :param aliases: Other names it is found under.
    :param example: Keyword arguments that make a valid instance for m rows, given m.
    :param expected_failures: ``{check: reason}`` for conformance checks known to fail. Strict: a
        check listed here that passes is an error.
    :param api_version: The plugin interface this spec was written for, :data:`API_VERSION`.
    :raises ParameterError: If a field does not have the form described above.
    """

    weighting: str | None = field(default=None, validator=_valid_factory)
    aggregator: str | None = field(default=None, validator=_valid_factory)
    properties: frozenset[Property] = field(
        default=frozenset(), converter=_properties, validator=_all_properties
    )
    losses: bool = field(default=False, validator=boolean)
    cross_gramian: bool = field(default=False, validator=boolean)
    wrapper: bool = field(default=False, validator=boolean)
    min_rows: int = field(default=1, validator=integer(1))

    def __attrs_post_init__(self) -> None:
        # Here and not in a validator, which knows one field only.
        if (self.weighting is None) == (self.aggregator is None):
            raise ParameterError(
                "weighting", "given if and only if `aggregator` is not", repr(self.weighting)
            )
        if self.weighting is not None and not self.weighting.endswith("Weighting"):
            raise ParameterError(
                "weighting", "a class whose name ends in 'Weighting'", repr(self.weighting)
            )
        if self.cross_gramian and self.weighting is None:
            raise ParameterError(
                "cross_gramian", "False for a method that sees the matrix", repr(self.cross_gramian)
            )

    @property
    def class_name(self) -> str:
        """Name of the aggregator class, e.g. ``"UPGrad"``."""
        factory = self.weighting or self.aggregator or ""
        return factory.partition(":")[2].removesuffix("Weighting")

    @property
    def input(self) -> str:
        """What the method looks at: ``"gramian"``, ``"cross_gramian"`` or ``"matrix"``."""
        if self.weighting is None:
            return "matrix"
        return "cross_gramian" if self.cross_gramian else "gramian"


@frozen(kw_only=True)
class ScalarizerSpec(_MethodSpec):
    """
    Everything jdcore knows of a scalarizer before importing it.

    :param name: Registry name, lower snake case. Scalarizers and aggregators may share names.
    :param summary: One line that says what scalar it makes of the losses.
    :param scalarizer: ``"module:attribute"`` of the class, which satisfies
        :class:`~jdcore.Scalarizer`.
    :param reference: The publication; None for what is common knowledge.
    :param positive: Whether losses have to be positive, or above a bound that is an argument; other
        ones raise a ParameterError.
    :param trainable: Whether it is a :class:`torch.nn.Module` with parameters, which belong to the
        optimizer.
    :param stateful: Whether results depend on earlier calls (see :class:`~jdcore.Stateful`).
    :param stochastic: Whether results depend on a random generator (argument ``generator``).
    :param surrogate: Whether the gradient with respect to the losses is, by design, not the
        derivative of the scalar.
    :param advanced_by: Name of the method that a training loop has to call beside, once per step or
        epoch, with the losses after the step if it takes an argument; None if there is none.
    :param requires: Names of the distributions needed beyond torch and numpy.
    :param aliases: Other names it is found under.
    :param example: Keyword arguments that make a valid instance for m losses, given m.
    :param expected_failures: ``{check: reason}`` for conformance checks known to fail. Strict: a
        check listed here that passes is an error.
    :param api_version: The plugin interface this spec was written for, :data:`API_VERSION`.
    :raises ParameterError: If a field does not have the form described above.
    """

    scalarizer: str = field(validator=_valid_factory)
    positive: bool = field(default=False, validator=boolean)
    trainable: bool = field(default=False, validator=boolean)
    surrogate: bool = field(default=False, validator=boolean)
    advanced_by: str | None = field(default=None, validator=_method)

    @property
    def class_name(self) -> str:
        """Name of the class, e.g. ``"FAMO"``."""
        return self.scalarizer.partition(":")[2]


@frozen(kw_only=True)
class SolverSpec:
    """
    A backend for a problem that methods pose, selectable by name (``solver="quadprog"``).

    :param name: Name of the backend, unique for its problem.
    :param problem: The problem it solves, e.g. ``"dual_cone"``; the protocol of that problem (here
        :class:`~jdcore.protocols.DualConeSolver`) is what the factory must return.
    :param summary: One line: algorithm, accuracy, when to choose it.
    :param factory: ``"module:attribute"``, called without arguments, or with keyword arguments
        given by the user (see :func:`~jdcore.get_solver`).
    :param variants: Whether ``"name:variant"`` selects one of several solvers behind the backend,
        as in ``"qpsolvers:daqp"``. The variant, in the user's spelling, is then the first argument
        of the factory, which refuses an unknown one; without it the factory chooses.
    :param requires: Names of the distributions needed beyond torch and numpy.
    :param api_version: The plugin interface this spec was written for, :data:`API_VERSION`.
    :raises ParameterError: If a field does not have the form described above.
    """

    name: str = field(validator=_valid_name)
    problem: str = field(validator=_valid_name)
    summary: str = field(validator=_text)
    factory: str = field(validator=_valid_factory)
    api_version: int = field(validator=_api_version)
    variants: bool = field(default=False, validator=boolean)
    requires: tuple[str, ...] = field(default=(), converter=_strings, validator=_requires)


@frozen(kw_only=True)
class GramianRuleSpec:
    """
    A closed form of autogram for one operation of the graph.

    Both the operation and the rule are named, not imported: a function whose module was never
    imported cannot be in anybody's graph.

    :param name: Name of the rule, lower snake case.
    :param operation: ``"module:attribute"`` of a ``torch.autograd.Function``, subclasses that do
        not override ``backward`` included; or the name of a node of an operation that torch or an
        extension brings, such as ``"CdistBackward0"``, as the ``grad_fn`` of a result shows it.
        Operations that the core has a rule for are taken.
    :param rule: ``"module:attribute"`` of the rule, a :class:`~jdcore.autogram.GramianRule`.
    :param summary: One line: which form of the Jacobian the rule uses.
    :param steady: Whether shapes alone decide which entries of the results depend on which entries
        of the operands, and the backward pass hands NaN on to all of these. Where samples are is
        then shown once for each kind of graph; behind other operations, at every call.
    :param api_version: The plugin interface this spec was written for, :data:`API_VERSION`.
    :raises ParameterError: If a field does not have the form described above.
    """

    name: str = field(validator=_valid_name)
    operation: str = field(validator=_operation)
    rule: str = field(validator=_valid_factory)
    summary: str = field(validator=_text)
    api_version: int = field(validator=_api_version)
    steady: bool = field(default=False, validator=boolean)
