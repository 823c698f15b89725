"""Configurations of registered methods: the round trip, and errors that name the path."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from typing import Any, Optional, Union

import numpy as np
import pytest
import torch
from attrs import define, field
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

import jdcore
from jdcore import AggregatorSpec, ParameterError, ParameterTypeError, UnknownNameError
from jdcore.aggregation import (
    Flattening,
    GramianAggregator,
    GramianSource,
    GramianWeighting,
    RowMixing,
    as_module,
    solver_field,
)
from jdcore.config._arguments import Argument
from jdcore.config._write import _is_default
from jdcore.validators import generator, integer, real, row_vector

Array = NDArray[np.float64]


@define(eq=False)
class ConfigurableWeighting(GramianWeighting):
    """Has an argument of every kind."""

    pref_vector: Tensor | None = field(default=None, validator=row_vector)
    c: float = field(default=0.5, validator=real(0.0))
    steps: int = field(default=3, validator=integer(1))
    schedule: tuple[int, ...] = field(default=(1, 2), converter=tuple)
    generator: torch.Generator | None = field(default=None, validator=generator, kw_only=True)

    def compute(self, gramian: Array) -> Array:
        return np.full(len(gramian), self.c)


@define(eq=False)
class DelegatingWeighting(GramianWeighting):
    """Wraps another weighting, and cannot do without one."""

    weighting: GramianWeighting = field()
    scale: float = field(default=1.0, validator=real(0.0))

    def compute(self, gramian: Array) -> Array:
        return self.scale * self.weighting.compute(gramian)


@define(eq=False)
class ReversedRows(RowMixing):
    """Combines rows, and has a weighting as what it wraps has one."""

    def mix(self, source: GramianSource) -> Array:
        return np.eye(source.rows)[::-1]


class PlainAggregator:
    """Neither attrs nor a base class: the signature is all there is."""

    def __init__(self, row: int = 0) -> None:
        self.row = row

    def __call__(self, matrix: Tensor, /) -> Tensor:
        return matrix[self.row]


@define(eq=False)
class MisnamedWeighting(ConfigurableWeighting):
    """One of its arguments has the name of the key that is taken."""

    name: str = "nobody"


ENDLESS: list[Any] = []
ENDLESS.append(ENDLESS)


@pytest.fixture(autouse=True)
def _methods() -> None:
    factories = {
        "configurable": {"weighting": f"{__name__}:ConfigurableWeighting"},
        "delegating": {"weighting": f"{__name__}:DelegatingWeighting"},
        "mixing": {"aggregator": f"{__name__}:ReversedRows", "wrapper": True},
        "plain": {"aggregator": f"{__name__}:PlainAggregator"},
        "misnamed": {"weighting": f"{__name__}:MisnamedWeighting"},
    }
    for name, factory in factories.items():
        jdcore.register(
            AggregatorSpec(name=name, summary="For this test.", api_version=1, **factory)
        )


def through_json(config: dict[str, Any]) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(json.dumps(config))
    return read


def test_arguments_at_their_default_are_left_out() -> None:
    assert jdcore.to_config(ConfigurableWeighting()) == {"name": "configurable"}


def test_every_kind_of_argument_survives_the_round_trip() -> None:
    preferences = torch.tensor([0.1, 0.9])
    method = jdcore.get_aggregator(
        "configurable", pref_vector=preferences, c=0.1, steps=7, schedule=(4,), check_finite=True
    )

    config = through_json(jdcore.to_config(method))
    rebuilt = jdcore.get_aggregator(config)

    assert config["pref_vector"] == preferences.tolist()
    assert repr(rebuilt) == repr(method)
    assert type(rebuilt) is type(method)
    assert torch.equal(rebuilt.weighting.pref_vector, preferences)
    assert rebuilt.weighting.check_finite is True
    assert jdcore.to_config(rebuilt) == config


def test_integers_of_numpy_are_written_as_those_of_python() -> None:
    config = jdcore.to_config(ConfigurableWeighting(steps=np.int64(7)))

    assert through_json(config) == {"name": "configurable", "steps": 7}


@given(
    values=st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=5),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
)
def test_tensors_come_back_in_their_dtype_to_the_last_bit(
    values: list[float], dtype: torch.dtype
) -> None:
    tensor = torch.tensor(values, dtype=dtype)

    config = through_json(jdcore.to_config(ConfigurableWeighting(pref_vector=tensor)))
    rebuilt = jdcore.get_weighting(config).pref_vector

    assert rebuilt.dtype == dtype
    assert torch.equal(rebuilt, tensor)


def test_one_configuration_makes_the_aggregator_and_the_weighting() -> None:
    config = {"name": "Configurable", "c": 2.0}

    assert jdcore.get_weighting(config).c == 2.0
    assert jdcore.get_aggregator(config).weighting.c == 2.0


@pytest.mark.parametrize(
    "make",
    [
        lambda: GramianAggregator(DelegatingWeighting(ConfigurableWeighting(c=2.0), scale=3.0)),
        lambda: PlainAggregator(row=1),
    ],
)
def test_nested_methods_and_plain_classes_survive_the_round_trip(make: Any) -> None:
    method = make()

    config = through_json(jdcore.to_config(method))
    rebuilt = jdcore.get_aggregator(config)

    matrix = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert jdcore.to_config(rebuilt) == config
    assert torch.equal(rebuilt(matrix), method(matrix))


def test_the_weighting_of_what_mixes_rows_survives_the_round_trip() -> None:
    inner = ReversedRows(GramianAggregator(DelegatingWeighting(ConfigurableWeighting(c=0.25))))
    method = DelegatingWeighting(inner.weighting, scale=3.0)  # type: ignore[arg-type]

    config = through_json(jdcore.to_config(method))
    rebuilt = jdcore.get_weighting(config)

    assert config["weighting"]["name"] == "mixing"
    assert repr(rebuilt) == repr(method)
    assert repr(jdcore.get_weighting(config["weighting"])) == repr(inner.weighting)
    with pytest.raises(ParameterTypeError, match=r"`config\.aggregator` must be a Weighting or"):
        jdcore.get_weighting({"name": "mixing", "aggregator": {"name": "plain"}})


def test_a_flattening_is_a_weighting_with_a_weighting_inside() -> None:
    config = through_json(jdcore.to_config(Flattening(ConfigurableWeighting(c=2.0))))

    assert config == {"name": "flattening", "weighting": {"name": "configurable", "c": 2.0}}
    assert jdcore.get_weighting(config)(torch.ones(2, 3, 3, 2)).tolist() == [[2.0] * 3] * 2


def test_arguments_beside_a_configuration_take_precedence() -> None:
    random = torch.Generator()
    method = ConfigurableWeighting(c=2.0, generator=random)

    config = jdcore.to_config(method, omit=["generator"])
    rebuilt = jdcore.get_weighting(config, generator=random, c=3.0)

    assert config == {"name": "configurable", "c": 2.0}
    assert rebuilt.generator is random
    assert rebuilt.c == 3.0


class ForeignMapping(Mapping[str, Any]):
    """As containers of configuration libraries: a Mapping that is no dict."""

    def __init__(self, items: dict[str, Any]) -> None:
        self._items = items

    def __getitem__(self, key: str) -> Any:
        value = self._items[key]
        return ForeignMapping(value) if isinstance(value, dict) else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


def test_any_mapping_will_do() -> None:
    inner = {"name": "configurable", "pref_vector": {"data": (1, 2), "dtype": "float64"}}

    method = jdcore.get_weighting(ForeignMapping({"name": "delegating", "weighting": inner}))

    assert torch.equal(method.weighting.pref_vector, torch.tensor([1.0, 2.0]).double())


NESTED = {"name": "configurable"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "Parameter `config.name` must be the name of an aggregator, got nothing."),
        ({"name": 3}, "Parameter `config.name` must be the name of an aggregator, got 3."),
        (
            {"name": "configurable", "C": 1.0},
            "Parameter `config.C` must be an argument of 'configurable' (check_finite, ",
        ),
        ({"name": "configurable", "c": -1.0}, "Parameter `config.c` must be >= 0.0 and finite,"),
        ({"name": "configurable", "c": "1e-3"}, "Parameter `config.c` must be a real number, got"),
        (
            {"name": "configurable", "pref_vector": [1.0, [2.0]]},
            "Parameter `config.pref_vector` must be numbers in lists of equal length, got",
        ),
        (
            {"name": "configurable", "pref_vector": ["a"]},
            "Parameter `config.pref_vector[0]` must be a real number, got 'a'.",
        ),
        (
            {"name": "configurable", "pref_vector": {"data": [1.0], "dtype": "load"}},
            "Parameter `config.pref_vector.dtype` must be one of float16, ",
        ),
        (
            {"name": "configurable", "pref_vector": {"data": [1.0], "dtype": ["float64"]}},
            "Parameter `config.pref_vector.dtype` must be one of float16, ",
        ),
        (
            {"name": "configurable", "pref_vector": b"ab"},
            "Parameter `config.pref_vector` must be numbers, strings, lists or mappings, got b'ab",
        ),
        (
            {"name": "configurable", "schedule": [1, bytearray(b"ab")]},
            "Parameter `config.schedule[1]` must be numbers, strings, lists or mappings, got byte",
        ),
        (
            {"name": "configurable", "pref_vector": [1 + 2j, 1]},
            "Parameter `config.pref_vector[0]` must be a real number, got (1+2j).",
        ),
        (
            {"name": "configurable", "pref_vector": [True, 1]},
            "Parameter `config.pref_vector[0]` must be a real number, got True.",
        ),
        (
            {"name": "configurable", "pref_vector": [1, 1e300]},
            "Parameter `config.pref_vector[1]` must be in the range of float32, got 1e+300.",
        ),
        (
            {"name": "configurable", "pref_vector": [10**400]},
            "Parameter `config.pref_vector[0]` must be in the range of float32, got 1000",
        ),
        (
            {"name": "configurable", "pref_vector": [10**5000]},
            "Parameter `config.pref_vector[0]` must be in the range of float32, got an integer too",
        ),
        (
            {"name": "configurable", "pref_vector": {"data": [1.5], "dtype": "int64"}},
            "Parameter `config.pref_vector[0]` must be a whole number, got 1.5.",
        ),
        (
            {"name": "configurable", "c": 10**400},
            "Parameter `config.c` must be >= 0.0 and finite, got an integer of 1329 bits.",
        ),
        (
            {"name": "configurable", "a.pref_vector": [1.0]},
            "Parameter `config.a.pref_vector` must be an argument of 'configurable' (",
        ),
        (
            {"name": "configurable", 3: 1.0},
            "Parameter `config.3` must be an argument of 'configurable' (",
        ),
        (
            {"name": "configurable", "schedule": ENDLESS},
            "Parameter `config.schedule",
        ),
        (
            {"name": "configurable", "pref_vector": {"values": [1.0]}},
            "Parameter `config.pref_vector` must be a list, or the keys `data` and `dtype`, got",
        ),
        (
            {"name": "delegating"},
            "Parameter `config.weighting` must be given for 'delegating'",
        ),
        (
            {"name": "delegating", "weighting": NESTED | {"steps": 0}},
            "Parameter `config.weighting.steps` must be >= 1, got 0.",
        ),
        (
            {"name": "delegating", "weighting": NESTED | {"pref_vector": 1.0}},
            "Parameter `config.weighting.pref_vector` must be a finite floating vector with one",
        ),
        (
            {"name": "delegating", "weighting": {"name": "plain"}},
            "Parameter `config.weighting.name` must be a method whose weights depend on the",
        ),
        (
            {"name": "flattening", "weighting": NESTED},
            "Parameter `config.name` must be the name of an aggregator, got 'flattening', a "
            "weighting. Build it with get_weighting(config).",
        ),
        (
            {"name": "misnamed"},
            "Parameter `name` must be the method itself in a configuration, got an argument of",
        ),
    ],
)
def test_a_bad_configuration_is_refused_with_the_path_inside_it(
    config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ParameterError) as caught:
        jdcore.get_aggregator(config)

    assert str(caught.value).startswith(message)


def test_an_object_made_before_a_refresh_is_still_described() -> None:
    method = jdcore.get_aggregator("configurable", c=2.0)

    jdcore.refresh()

    assert jdcore.to_config(method) == {"name": "configurable", "c": 2.0}


def test_an_unknown_name_is_refused_with_its_path_and_close_matches() -> None:
    config = {"name": "delegating", "weighting": {"name": "configurabel"}}

    with pytest.raises(UnknownNameError, match=r"`config\.weighting\.name` asks for it") as caught:
        jdcore.get_aggregator(config)

    assert "configurable" in caught.value.close


@define(eq=False)
class SolvingWeighting(GramianWeighting):
    """Poses a problem that nobody solves."""

    solver: Any = solver_field("a_problem_of_this_test")

    def compute(self, gramian: Array) -> Array:
        return np.ones(len(gramian))


def test_an_unknown_solver_is_refused_with_its_path() -> None:
    jdcore.register(
        AggregatorSpec(
            name="solving",
            summary="For this test.",
            weighting=f"{__name__}:SolvingWeighting",
            api_version=1,
        )
    )

    with pytest.raises(UnknownNameError, match=r"`config\.solver` asks for it"):
        jdcore.get_aggregator({"name": "solving", "solver": "no_such_solver"})


@pytest.mark.parametrize(
    "config",
    [
        {"_target_": "os.system", "name": "plain"},
        {"name": "os:system"},
        {"name": "plain", "row": {"_target_": "os.system", "command": "true"}},
        {"name": "configurable", "pref_vector": {"name": "os:system"}},
    ],
)
def test_a_configuration_cannot_import_anything(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.system", lambda _: pytest.fail("a configuration reached os.system"))

    if "row" in config:
        assert jdcore.get_aggregator(config).row == config["row"]
        return
    with pytest.raises((ParameterError, UnknownNameError)):
        jdcore.get_aggregator(config)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            len,
            "Parameter `config` must be an instance of a registered aggregator, weighting or "
            "scalarizer",
        ),
        (
            GramianAggregator(len),
            "Parameter `config.weighting` must be data: a number, string, boolean, None, list, ",
        ),
        (
            ConfigurableWeighting(generator=torch.Generator()),
            "Parameter `config.generator` must be data: ",
        ),
        (
            ConfigurableWeighting(pref_vector=torch.ones(2, device="meta")),
            "Parameter `config.pref_vector` must be a Tensor with entries, got a float32 Tensor",
        ),
    ],
)
def test_what_is_no_data_is_refused_with_its_path(method: Any, message: str) -> None:
    with pytest.raises(ParameterError) as caught:
        jdcore.to_config(method)

    assert str(caught.value).startswith(message)


def test_a_module_around_a_method_has_the_configuration_of_the_method() -> None:
    module = as_module(ConfigurableWeighting())
    with pytest.raises(ParameterTypeError, match="Give what it wraps"):
        jdcore.to_config(module)

    assert jdcore.to_config(module.wrapped) == {"name": "configurable"}


def test_omitting_an_argument_that_is_not_there_is_refused() -> None:
    with pytest.raises(ParameterError, match="`omit` must be arguments of 'configurable'"):
        jdcore.to_config(ConfigurableWeighting(), omit=["generatr"])


@pytest.mark.parametrize(
    ("hint", "accepted"),
    [
        ("Tensor", True),
        ("torch.Tensor | None", True),
        ("Optional[Tensor]", True),
        (Tensor, True),
        (Optional[Tensor], True),  # noqa: UP045 - as older code writes it
        (Union[str, Tensor], True),  # noqa: UP007 - as above
        ("Callable[[Tensor], Tensor]", False),
        ("dict[str, Tensor]", False),
        (float, False),
        (None, False),
    ],
)
def test_annotations_tell_which_arguments_are_tensors(hint: Any, accepted: bool) -> None:
    assert Argument("a", "a", None, hint).accepts("Tensor") is accepted


def test_an_unknown_argument_beside_a_configuration_is_refused() -> None:
    with pytest.raises(ParameterTypeError, match="Parameter `C` must be an argument of 'configur"):
        jdcore.get_weighting({"name": "configurable"}, C=1.0)


def test_a_mapping_with_keys_that_are_no_strings_is_no_data() -> None:
    # JSON would write both keys as "1", and read one of the values back.
    weighting = ConfigurableWeighting()
    object.__setattr__(weighting, "c", {1: 2, "1": 3})

    with pytest.raises(ParameterTypeError, match=r"a mapping whose keys are strings, got 1\."):
        jdcore.to_config(weighting)


@pytest.mark.parametrize("default", [np.zeros(2), [torch.zeros(2)]])
def test_a_default_that_compares_by_entry_is_written_out(default: Any) -> None:
    argument = Argument("c", "c", default, "object")
    owner = ConfigurableWeighting()
    object.__setattr__(owner, "c", copy.deepcopy(default))

    assert not _is_default(argument, owner)
