"""The registry of one process: names, registration at run time, errors of look-ups."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any
from weakref import ref

import numpy as np
import pytest
from attrs import define
from numpy.typing import NDArray
from torch import Tensor

import jdcore
from jdcore import (
    AggregatorSpec,
    GramianRuleSpec,
    ParameterError,
    ParameterTypeError,
    ScalarizerSpec,
    UnknownNameError,
    _methods,
    _registry,
)
from jdcore._discovery import AGGREGATOR, KINDS, Kind, PluginRecord
from jdcore._gramian_rules import RUNTIME, OperationTable
from jdcore._loading import Loading
from jdcore._registry import Registry
from jdcore._tables import Entry
from jdcore.aggregation import GramianWeighting
from jdcore.errors import AmbiguousNameError, PluginError
from jdcore.exports import exports_of


@define(eq=False)
class LastRowWeighting(GramianWeighting):
    """Weight 1 on the last objective, 0 on the others."""

    def compute(self, gramian: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.eye(len(gramian))[-1]


@define(eq=False)
class PowerWeighting(GramianWeighting):
    """Cannot do without an argument."""

    power: float

    def compute(self, gramian: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(gramian.diagonal() ** self.power)


def spec(name: str = "last_row", **changes: object) -> AggregatorSpec:
    fields = {
        "summary": "Takes the last row only.",
        "weighting": f"{__name__}:LastRowWeighting",
        "api_version": 1,
    }
    return AggregatorSpec(name=name, **(fields | changes))  # type: ignore[arg-type]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setattr(_methods, "registry", Registry())
    return _methods.registry


@pytest.mark.parametrize(
    "spelling", ["last_row", "last-row", "LastRow", "LASTROW", "runtime:LastRow"]
)
def test_a_registered_method_is_found_in_any_spelling(registry: Registry, spelling: str) -> None:
    registry.register(spec())

    assert _methods.weighting_class(spelling) is LastRowWeighting
    assert _methods.aggregator_class(spelling).__name__ == "LastRow"
    assert _methods.exported_class(AGGREGATOR, "LastRowWeighting") is LastRowWeighting
    assert _methods.exported_class(AGGREGATOR, "LastRow") is _methods.aggregator_class(spelling)


def test_the_composed_class_takes_the_arguments_and_the_docstring_of_its_weighting(
    registry: Registry,
) -> None:
    registry.register(spec())

    cls = _methods.aggregator_class("last_row")

    assert cls.__doc__ == LastRowWeighting.__doc__
    assert repr(cls(check_finite=True)) == "LastRow()"
    assert cls(check_finite=True).weighting.check_finite is True


def test_a_composed_aggregator_keeps_to_the_class_of_its_weighting(registry: Registry) -> None:
    registry.register(spec())
    aggregator = _methods.aggregator_class("last_row")()
    old = aggregator.weighting

    for other in (PowerWeighting(2.0), type("Other", (LastRowWeighting,), {})(), len):
        # Its repr, its pickle and its configuration would name the method it was made as.
        with pytest.raises(ParameterTypeError, match=r"LastRowWeighting, .*GramianAggregator"):
            aggregator.weighting = other
    assert aggregator.weighting is old
    aggregator.weighting = new = LastRowWeighting()
    assert aggregator.weighting is new


def test_a_factory_that_is_no_class_is_named(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "NumberWeighting", 3)
    registry.register(spec(weighting=f"{__name__}:NumberWeighting"))

    with pytest.raises(PluginError, match=r"'.*:NumberWeighting' cannot be loaded: neither .* int"):
        _methods.aggregator_class("last_row")


@pytest.mark.parametrize(
    ("field", "find"),
    [
        ("weighting", _methods.aggregator_class),
        ("weighting", _methods.weighting_class),
        ("aggregator", _methods.aggregator_class),
    ],
)
def test_a_function_that_makes_a_method_is_no_class(
    registry: Registry,
    monkeypatch: pytest.MonkeyPatch,
    field: str,
    find: Callable[[str], type],
) -> None:
    # As an attribute of the composed class it would be a method, and get the aggregator itself for
    # its first argument.
    monkeypatch.setitem(globals(), "MadeWeighting", lambda scale=1.0: PowerWeighting(scale))
    factory = f"{__name__}:MadeWeighting"
    registry.register(spec(**{"weighting": None, field: factory}))

    with pytest.raises(PluginError, match=r"':?.*:MadeWeighting' is no class, but of type func"):
        find("last_row")


def test_a_subclass_of_a_composed_class_is_copied_as_what_it_is(registry: Registry) -> None:
    registry.register(spec())

    class Shorter(_methods.aggregator_class("last_row")):  # type: ignore[misc]
        __slots__ = ("factor",)

        def __init__(self) -> None:
            self.factor = [0.5]
            super().__init__()

        def __call__(self, matrix: Tensor, **inputs: Any) -> Any:
            return self.factor * super().__call__(matrix, **inputs)

    original = Shorter()
    duplicate = copy.deepcopy(original)

    assert type(duplicate) is Shorter
    assert duplicate.factor == [0.5]
    assert duplicate.factor is not original.factor
    assert duplicate.weighting is not original.weighting
    with pytest.raises(ParameterTypeError, match="`config` must be an instance of a registered"):
        jdcore.to_config(original)


def test_a_class_that_was_defined_anew_is_let_go(registry: Registry) -> None:
    registry.register(spec(weighting=f"{__name__}:RedefinedWeighting"))

    def cell() -> list[ref[type]]:
        class RedefinedWeighting(LastRowWeighting):
            pass

        globals()["RedefinedWeighting"] = RedefinedWeighting
        composed = _methods.aggregator_class("last_row")
        assert composed is _methods.aggregator_class("last_row")
        return [ref(RedefinedWeighting), ref(composed)]

    before, after = cell(), cell()
    gc.collect()

    del globals()["RedefinedWeighting"]
    assert [kept() for kept in before] == [None, None]
    assert None not in [kept() for kept in after]


def test_an_argument_is_set_on_the_weighting_and_nowhere_else(registry: Registry) -> None:
    registry.register(spec())
    aggregator = _methods.aggregator_class("last_row")()

    with pytest.raises(AttributeError, match=r"aggregator\.weighting\.check_finite = "):
        aggregator.check_finite = True
    assert aggregator.weighting.check_finite is None
    with pytest.raises(AttributeError, match="no attribute 'chek_finite'"):
        aggregator.chek_finite = True


def test_registering_again_replaces_the_earlier_registration(registry: Registry) -> None:
    registry.register(spec())
    registry.register(spec(summary="Another summary."))

    assert registry.entry(AGGREGATOR, "last_row").spec.summary == "Another summary."


def test_registrations_survive_a_refresh(registry: Registry) -> None:
    registry.register(spec())
    registry.refresh()

    assert "last_row" in registry.names(AGGREGATOR)


def test_what_a_refresh_has_overtaken_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    registry, looks = Registry(), []
    monkeypatch.setattr(_registry, "installed_plugins", lambda: looks.append(1) or [])

    class Overtaken(Loading):
        def advance(self) -> None:
            if len(looks) == 1:  # as by another thread that has installed something
                registry.refresh()

    monkeypatch.setattr(_registry, "Loading", Overtaken)

    registry.names(AGGREGATOR)
    registry.names(AGGREGATOR)
    registry.names(AGGREGATOR)

    assert len(looks) == 2


def test_classes_stay_the_same_whatever_else_is_registered(registry: Registry) -> None:
    registry.register(spec())
    cls = _methods.aggregator_class("last_row")

    registry.register(spec("another_last_row"))
    registry.refresh()

    assert _methods.aggregator_class("last_row") is cls


def test_registering_a_taken_alias_is_refused_and_changes_nothing(registry: Registry) -> None:
    registry.register(spec())
    before = registry.names(AGGREGATOR)

    with pytest.raises(
        ParameterError, match=r"`name` must be free, got .last_row., taken by runtime"
    ):
        registry.register(spec("other", aliases=["last_row"]))

    assert registry.names(AGGREGATOR) == before


def test_registering_something_else_is_refused(registry: Registry) -> None:
    with pytest.raises(
        ParameterTypeError, match="`spec` must be an AggregatorSpec, a ScalarizerSpec or a"
    ):
        registry.register("last_row")  # type: ignore[arg-type]


def test_an_unknown_name_shows_close_matches_and_what_is_registered(registry: Registry) -> None:
    registry.register(spec())

    with pytest.raises(UnknownNameError, match="Close matches: last_row") as caught:
        registry.entry(AGGREGATOR, "lst_row")

    assert caught.value.name == "lst_row"
    assert caught.value.close == ("last_row",)
    assert "last_row" in caught.value.known


def test_an_exported_name_must_be_the_exact_class_name(registry: Registry) -> None:
    registry.register(spec())

    with pytest.raises(AttributeError, match="did you mean 'LastRow'"):
        _methods.exported_class(AGGREGATOR, "Lastrow")
    with pytest.raises(AttributeError, match="No aggregator is registered"):
        _methods.exported_class(AGGREGATOR, "NoSuchMethod")


def test_a_method_that_sees_the_matrix_exports_no_weighting(registry: Registry) -> None:
    registry.register(spec(weighting=None, aggregator=f"{__name__}:LastRow"))

    # Not an error of its own: `hasattr` asks for this one.
    with pytest.raises(AttributeError, match=r"LastRow has to see the matrix: use get_aggregator"):
        _methods.exported_class(AGGREGATOR, "LastRowWeighting")


def test_a_class_is_exported_by_its_own_name_whatever_the_method_is_called(
    registry: Registry,
) -> None:
    registry.register(spec("final"))

    assert {"LastRow", "LastRowWeighting"} <= set(_methods.exported_names(AGGREGATOR))
    assert _methods.exported_class(AGGREGATOR, "LastRow") is _methods.aggregator_class("final")
    with pytest.raises(AttributeError, match="did you mean 'LastRow'"):
        _methods.exported_class(AGGREGATOR, "Final")


def test_the_method_that_is_called_like_its_class_exports_it(registry: Registry) -> None:
    registry.register(spec("a_variant"))
    registry.register(spec())

    exported: Any = _methods.exported_class(AGGREGATOR, "LastRow")
    assert exported.qualified_name == "runtime:last_row"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.word)
def test_a_class_name_that_two_distributions_claim_is_exported_by_neither(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    scalarizer = ScalarizerSpec(name="last_row", summary="s", scalarizer="a:LastRow", api_version=1)
    one = spec() if kind is AGGREGATOR else scalarizer
    records = [
        PluginRecord(distribution=d, version="1", entry_point=d, **{f"{kind.word}s": (one,)})
        for d in ("first", "second")
    ]
    monkeypatch.setattr("jdcore._loading.Loading.records", lambda _: tuple(records))
    monkeypatch.setattr(registry, "_report", lambda known: None)

    with pytest.raises(AmbiguousNameError, match="'first:last_row', 'second:last_row'"):
        _methods.exported_class(kind, "LastRow")


@pytest.mark.parametrize("kind", ["scalarizer", "aggregator", "", None])
def test_a_package_says_which_of_two_kinds_it_exports(kind: Any) -> None:
    with pytest.raises(ParameterError, match="`kind` must be one of 'aggregators', 'scalarizers'"):
        exports_of("my-methods", kind)


def test_a_name_that_is_no_string_is_refused() -> None:
    with pytest.raises(ParameterTypeError, match="Parameter `name` must be a string, got 3"):
        jdcore.get_aggregator(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [jdcore.get_aggregator, jdcore.get_weighting])
def test_an_argument_that_is_missing_is_named(
    registry: Registry, make: Callable[..., object]
) -> None:
    registry.register(spec("power", weighting=f"{__name__}:PowerWeighting"))

    with pytest.raises(ParameterTypeError, match="`power` must be given for 'power', got nothing"):
        make("power")
    with pytest.raises(ParameterTypeError, match=r"`config\.power` must be given for 'power'"):
        make({"name": "power"})


def test_an_unknown_solver_names_its_problem(registry: Registry) -> None:
    with pytest.raises(UnknownNameError, match="No no_such_problem solver is registered under"):
        registry.solver("no_such_problem", "native")


def test_a_name_that_two_methods_claim_is_ambiguous(registry: Registry) -> None:
    registry.register(spec())
    entry = registry.entry(AGGREGATOR, "last_row")
    registry._discover().methods[AGGREGATOR].add(entry, ("last_row",))

    with pytest.raises(AmbiguousNameError):
        registry.entry(AGGREGATOR, "last_row")


def test_the_contracts_are_exported_beside_the_methods() -> None:
    from jdcore.aggregation import Aggregator, GeneralizedWeighting, Weighting

    assert Aggregator is jdcore.Aggregator
    assert (GeneralizedWeighting, Weighting) == (jdcore.GeneralizedWeighting, jdcore.Weighting)


def test_the_name_of_a_submodule_leads_to_no_look_up(monkeypatch: pytest.MonkeyPatch) -> None:
    get, _ = exports_of("my-methods")
    # It would import the plugin whose package is being imported.
    monkeypatch.setattr(Registry, "records", lambda _: pytest.fail("plugins are looked for"))

    with pytest.raises(AttributeError, match="my-methods provides no class 'plugin'"):
        get("plugin")


def test_a_rule_that_is_registered_settles_a_clash_between_distributions() -> None:
    installed = [Entry(distribution, rule_spec()) for distribution in ("one", "two")]
    assert OperationTable(installed).clashes() == {"my:Function": ["one:mine", "two:mine"]}

    table = OperationTable([*installed, Entry(RUNTIME, rule_spec())])

    assert table.clashes() == {}
    assert [entry.distribution for entry in table.find("my:Function", None)] == [RUNTIME]


def rule_spec() -> GramianRuleSpec:
    return GramianRuleSpec(
        name="mine",
        operation="my:Function",
        rule="my:rule",
        summary="For tests.",
        api_version=1,
    )
