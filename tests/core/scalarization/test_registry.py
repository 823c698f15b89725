"""Scalarizers by name, from configurations, in listings, and with plain names of their own."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
from attrs import define
from torch import Tensor

import jdcore
import jdcore.scalarization
from jdcore import ParameterError, ParameterTypeError, ScalarizerSpec, UnknownNameError
from jdcore._discovery import SCALARIZER
from jdcore._registry import registry
from jdcore.cli import main
from jdcore.scalarization import LossScalarizer
from jdcore.testing import ConformanceError, scalarizer_checks


@define(eq=False)
class Widest(LossScalarizer):
    """
    Difference of the largest and the smallest loss.

    >>> Widest()(torch.tensor([1.0, 4.0]))
    tensor(3.)
    """

    def scalarize(self, losses: Tensor) -> Tensor:
        return losses.amax() - losses.amin()


@define(eq=False)
class Boastful(Widest):
    """
    Has an example that is false.

    >>> Boastful()(torch.tensor([1.0, 4.0]))
    tensor(4.)
    """


SPEC = ScalarizerSpec(
    name="widest",
    summary="Difference of the largest and the smallest loss.",
    scalarizer=f"{__name__}:Widest",
    aliases=("spread",),
    api_version=1,
)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    jdcore.register(SPEC)
    yield
    for name in ("widest", "boastful"):
        registry._runtime[SCALARIZER].pop(name, None)
    registry.refresh()


def test_a_registered_scalarizer_is_found_in_any_spelling() -> None:
    assert "widest" in jdcore.list_scalarizers()
    assert jdcore.describe_scalarizer("Widest") is SPEC
    assert jdcore.get_scalarizer("spread")(torch.tensor([1.0, 4.0, 2.0])).item() == 3.0
    assert jdcore.scalarization.Widest is type(jdcore.get_scalarizer("widest"))
    assert "Widest" in dir(jdcore.scalarization)


def test_aggregators_and_scalarizers_do_not_share_their_names() -> None:
    with pytest.raises(UnknownNameError, match="No aggregator"):
        jdcore.get_aggregator("widest")
    with pytest.raises(UnknownNameError, match=r"No scalarizer.*Close matches: widest"):
        jdcore.get_scalarizer("widst")


def test_it_passes_the_conformance_kit_of_scalarizers() -> None:
    for check in scalarizer_checks("widest"):
        if check.check.__name__ not in ("works_on_accelerators", "differentiates"):
            check.run()


def test_the_command_runs_the_kit(capsys: pytest.CaptureFixture[str]) -> None:
    main(["check", "--scalarizer", "widest"])

    shown = capsys.readouterr().out
    assert "passed   makes_one_loss_of_the_same_dtype" in shown
    assert "failed   describes_itself" not in shown


def test_a_false_example_fails_the_kit() -> None:
    name = f"{__name__}:Boastful"
    jdcore.register(
        ScalarizerSpec(name="boastful", summary="Wrong.", scalarizer=name, api_version=1)
    )
    checks = {check.check.__name__: check for check in scalarizer_checks("boastful")}

    with pytest.raises(ConformanceError, match="an example in the docstring is wrong"):
        checks["describes_itself"].run()


def test_a_configuration_makes_the_round_trip() -> None:
    config = jdcore.to_config(jdcore.get_scalarizer("widest"))

    assert config == {"name": "widest"}
    assert isinstance(jdcore.get_scalarizer(config), Widest)
    with pytest.raises(ParameterTypeError, match=r"`config\.power`"):
        jdcore.get_scalarizer({"name": "widest", "power": 2})


def test_unusable_arguments_and_names_are_refused() -> None:
    with pytest.raises(ParameterTypeError, match="`power`"):
        jdcore.get_scalarizer("widest", power=2)
    with pytest.raises(ParameterTypeError, match="`name` must be a string"):
        jdcore.get_scalarizer(3)  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="an AggregatorSpec, a ScalarizerSpec or"):
        jdcore.register("widest")  # type: ignore[arg-type]


def test_a_class_that_nobody_provides_is_no_attribute() -> None:
    assert not hasattr(jdcore.scalarization, "NoSuchScalarizer")
    with pytest.raises(AttributeError, match="did you mean 'Widest'"):
        _ = jdcore.scalarization.widest


def test_a_list_of_losses_is_refused_with_the_way_out() -> None:
    with pytest.raises(ParameterTypeError, match=r"torch\.stack\(losses\)"):
        Widest()([torch.tensor(1.0)])  # type: ignore[arg-type]


def test_the_commands_show_scalarizers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--scalarizers", "--json"]) == 0
    listed = {record["name"]: record for record in json.loads(capsys.readouterr().out)}
    assert listed["widest"]["summary"] == SPEC.summary

    assert main(["list", "--scalarizers"]) == 0
    assert SPEC.summary in capsys.readouterr().out

    assert main(["info", "--scalarizer", "widest"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("widest (Widest): Difference of")
    assert "spread" in shown
