"""The conformance kit catches what it promises to catch: each saboteur breaks one law."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from attrs import define, field
from numpy.typing import NDArray
from torch import Tensor

import jdcore
from jdcore import AggregatorSpec, ParameterError, Property, Reference
from jdcore.aggregation import (
    CrossGramianWeighting,
    GramianAggregator,
    GramianSource,
    GramianWeighting,
    LossWeighting,
)
from jdcore.testing import ConformanceError, NotApplicable, checks_of, conformance_tests

Array = NDArray[np.float64]


@define(eq=False)
class HonestWeighting(GramianWeighting):
    """
    Equal weights.

    >>> HonestWeighting()
    HonestWeighting()
    """

    def compute(self, gramian: Array) -> Array:
        return np.full(len(gramian), 1.0 / len(gramian))


@define(eq=False)
class BoastfulWeighting(HonestWeighting):
    """
    Has an example that is false.

    >>> BoastfulWeighting()(torch.eye(2))
    tensor([0.7000, 0.7000])
    """


@define(eq=False)
class SloppyWeighting(HonestWeighting):
    """
    Has an example that Python cannot read.

    >>>HonestWeighting()
    HonestWeighting()
    """


@define(eq=False)
class FixedScaleWeighting(HonestWeighting):
    """Weights that depend on the scale."""

    def compute(self, gramian: Array) -> Array:
        return 1.0 / (1.0 + np.diagonal(gramian))


@define(eq=False)
class FirstRowWeighting(HonestWeighting):
    """Weights that depend on the order."""

    def compute(self, gramian: Array) -> Array:
        return np.eye(len(gramian))[0]


@define(eq=False)
class RandomBitsWeighting(HonestWeighting):
    """Weights that differ from call to call."""

    def compute(self, gramian: Array) -> Array:
        return np.random.default_rng().random(len(gramian))


@define(eq=False)
class InverseLossWeighting(LossWeighting):
    """
    Weights inverse to the losses.

    >>> InverseLossWeighting()
    InverseLossWeighting()
    """

    def compute_with(self, gramian: Array, losses: Array) -> Array:
        return 1.0 / losses


@define(eq=False)
class CarelessLossWeighting(InverseLossWeighting):
    """Goes on without losses, and with NaN among them."""

    def weigh(self, source: GramianSource, /) -> Tensor:
        losses = torch.ones(source.rows) if source.losses is None else source.losses
        return 1.0 / losses.double()


@define(eq=False)
class FirstColumnWeighting(CrossGramianWeighting):
    """
    Looks at the cross-Gramian.

    >>> FirstColumnWeighting()
    FirstColumnWeighting()
    """

    def compute(self, gramian: Array) -> Array:
        return gramian.sum(axis=1) / np.abs(gramian).max() if gramian.any() else gramian[0]


@define(eq=False)
class OverwritingWeighting(HonestWeighting):
    """Writes into the Gramian it is given."""

    def __call__(self, gramian: Tensor, /) -> Tensor:
        return super(OverwritingWeighting, self).__call__(gramian.fill_(1.0))


@define(eq=False)
class SilentWeighting(HonestWeighting):
    """Turns non-finite input into finite weights."""

    def __call__(self, gramian: Tensor, /) -> Tensor:
        return torch.ones(len(gramian), dtype=gramian.dtype)


@define(eq=False)
class CredulousWeighting(HonestWeighting):
    """
    Takes anything for an argument.

    :param level: Anything.
    """

    level: Any = 0.0


class Secretive:
    """
    Keeps its argument where nobody finds it.

    :param level: Stays a secret.
    """

    def __init__(self, level: float = 0.0) -> None:
        self._level = level

    def __call__(self, matrix: Tensor, /) -> Tensor:
        return self._level * matrix.sum(dim=0)


class EmptyHanded:
    """Lacks a return."""

    def __call__(self, matrix: Tensor, /) -> None:
        matrix.sum(dim=0)


class OrdinaryWeighting:
    """Is not attrs."""

    def __call__(self, gramian: Tensor, /) -> Tensor:
        return torch.ones(len(gramian), dtype=gramian.dtype)


@define(eq=False)
class ForgetfulWeighting(HonestWeighting):
    """Has state that a saved state does not hold."""

    calls: int = field(default=0, init=False, repr=False)

    def compute(self, gramian: Array) -> Array:
        self.calls += 1
        return np.full(len(gramian), float(self.calls))

    def reset(self) -> None:
        """Does nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Returns nothing."""
        return {}

    def load_state_dict(self, state: Any, /) -> None:
        """Loads nothing."""


class TrustingWeighting(ForgetfulWeighting):
    """Knows the keys of its state, and loads whatever is under them."""

    def state_dict(self) -> dict[str, Any]:
        """The number of calls."""
        return {"calls": torch.tensor(float(self.calls))}

    def load_state_dict(self, state: Any, /) -> None:
        """Loads any number."""
        if set(state) != {"calls"}:
            raise ParameterError("state", "a mapping with the key 'calls'", repr(state))
        self.calls = state["calls"]


class Forgetful(GramianAggregator):
    """Aggregator of a stateful weighting."""

    weighting_class: type[Any] = ForgetfulWeighting

    def __init__(self) -> None:
        super().__init__(self.weighting_class())
        self.reset = self.weighting.reset  # type: ignore[attr-defined]
        self.state_dict = self.weighting.state_dict  # type: ignore[attr-defined]
        self.load_state_dict = self.weighting.load_state_dict  # type: ignore[attr-defined]


class Trusting(Forgetful):
    """Aggregator of a weighting that loads anything."""

    weighting_class = TrustingWeighting


class Counting(Trusting):
    """Counts the calls that come to nothing, too."""

    def __call__(self, matrix: Tensor, /, **known: Any) -> Tensor:
        self.weighting.calls += 1
        return super().__call__(matrix, **known)


class Widening(GramianAggregator):
    """Returns blocks in another dtype than they came in."""

    def __init__(self) -> None:
        super().__init__(HonestWeighting())

    def aggregate_blocks(self, blocks: Any, /) -> Any:
        vectors, weights = super().aggregate_blocks(blocks)
        return [vector.double() for vector in vectors], weights


class StillWeighting(HonestWeighting):
    """Never moves."""

    def compute(self, gramian: Array) -> Array:
        return np.zeros(len(gramian))


class Reckless:
    """Breaks all laws of the matrix at once."""

    def __call__(self, matrix: Tensor, /) -> Tensor:
        if not matrix.numel():
            return torch.ones(1)
        unit = matrix / matrix.norm(dim=-1, keepdim=True)
        matrix[0] = 0.0
        return unit.nan_to_num(1.0).sum(dim=0) + torch.finfo(unit.dtype).eps ** 0.5


ALL = tuple(p for p in Property if p is not Property.DIFFERENTIABLE)


PAPER = Reference(title="A paper", year=2024, url="https://example.org/paper")


def failures(name: str, weighting: str | None, **fields: Any) -> dict[str, str]:
    factory = {"weighting": f"{__name__}:{weighting}"} if weighting else {}
    jdcore.register(
        AggregatorSpec(name=name, summary="For this test.", api_version=1, **factory, **fields)
    )
    found = {}
    for check in checks_of(f"runtime:{name}"):
        try:
            check.run()
        except ConformanceError as error:
            found[check.check.__name__] = str(error)
        except NotApplicable:
            assert check.check.__name__ == "works_on_accelerators"
    return found


def test_a_false_example_is_shown() -> None:
    told = failures("boastful", "BoastfulWeighting")["describes_itself"]

    assert told.startswith("an example in the docstring is wrong:")
    assert "Expected:\n    tensor([0.7000, 0.7000])\nGot:\n    tensor([0.5000, 0.5000])" in told
    assert "malformed" in failures("sloppy", "SloppyWeighting")["describes_itself"]


def test_an_honest_method_passes_every_check() -> None:
    assert failures("honest", "HonestWeighting", properties=[Property.PERMUTATION_INVARIANT]) == {}


def test_honest_methods_that_look_at_more_than_the_gramian_pass_every_check() -> None:
    assert failures("inverse_loss", "InverseLossWeighting", losses=True) == {}
    assert failures("first_column", "FirstColumnWeighting", cross_gramian=True) == {}


def test_a_method_that_looks_at_more_than_its_spec_says_is_caught() -> None:
    undeclared_losses = failures("undeclared", "InverseLossWeighting")
    undeclared_batch = failures("undeclared", "FirstColumnWeighting")

    assert "`losses` must be given" in undeclared_losses["keeps_dtype_and_shape"]
    assert "`second` must be given" in undeclared_batch["keeps_dtype_and_shape"]


@pytest.mark.parametrize(
    ("name", "weighting", "check", "fields"),
    [
        ("careless", "CarelessLossWeighting", "is_refused_without_what_it_needs", {"losses": True}),
        ("careless", "CarelessLossWeighting", "checks_the_losses", {"losses": True}),
        ("idle", "HonestWeighting", "is_refused_without_what_it_needs", {"losses": True}),
        ("claims_peace", "HonestWeighting", "never_conflicts", {"properties": ALL}),
        ("claims_peace", "HonestWeighting", "withstands_an_adversary", {"properties": ALL}),
        ("still", "StillWeighting", "stops_only_where_strongly_stationary", {"properties": ALL}),
        ("fixed_scale", "FixedScaleWeighting", "is_scale_equivariant", {"properties": ALL}),
        ("fixed_scale", "FixedScaleWeighting", "is_linear_under_scaling", {"properties": ALL}),
        ("first_only", "FirstRowWeighting", "is_permutation_invariant", {"properties": ALL}),
        ("claims_stop", "FirstRowWeighting", "is_permutation_invariant", {"properties": ALL}),
        ("random_bits", "RandomBitsWeighting", "is_deterministic", {}),
        ("overwriting", "OverwritingWeighting", "weighting_keeps_its_laws", {}),
        ("silent", "SilentWeighting", "raises_for_nonfinite_input_when_asked", {}),
        ("silent", "SilentWeighting", "weighting_keeps_its_laws", {}),
        ("no_example", "FirstRowWeighting", "describes_itself", {}),
        ("no_link", "HonestWeighting", "describes_itself", {"reference": PAPER}),
        ("credulous", "CredulousWeighting", "refuses_unusable_arguments", {}),
        ("claims_state", "HonestWeighting", "is_stateful_as_declared", {"stateful": True}),
        (
            "claims_derivative",
            "HonestWeighting",
            "differentiates_as_declared",
            {"properties": [Property.DIFFERENTIABLE]},
        ),
    ],
)
def test_a_method_that_breaks_a_law_is_caught(
    name: str, weighting: str, check: str, fields: dict[str, Any]
) -> None:
    assert check in failures(name, weighting, **fields)


def test_each_law_of_the_matrix_is_seen_to_be_broken() -> None:
    found = failures("reckless", None, aggregator=f"{__name__}:Reckless", min_rows=2)

    assert set(found) >= {
        "agrees_between_dtypes",
        "leaves_its_input_alone",
        "handles_no_rows",
        "handles_no_columns",
        "handles_degenerate_rows",
        "refuses_too_few_rows",
        "refuses_malformed_matrices",
        "gives_nan_for_nonfinite_input",
        "raises_for_nonfinite_input_when_asked",
        "gives_the_same_by_blocks",
        "shows_what_you_would_type",
    }


def test_blocks_that_lose_their_dtype_are_caught() -> None:
    found = failures("widening", None, aggregator=f"{__name__}:Widening")

    assert found["gives_the_same_by_blocks"] == "a block lost its dtype"


def test_state_that_a_call_with_nan_changes_is_caught() -> None:
    found = failures("counting", None, aggregator=f"{__name__}:Counting", stateful=True)

    assert found["keeps_its_state_when_a_call_fails"] == "NaN input changed the state"


def test_state_that_is_not_saved_is_caught() -> None:
    found = failures("forgetful", None, aggregator=f"{__name__}:Forgetful", stateful=True)

    assert {"continues_from_a_saved_state", "resets_to_a_new_object"} <= set(found)
    assert "refuses_a_foreign_state" in found


def test_state_with_nan_that_is_believed_is_caught() -> None:
    found = failures("trusting", None, aggregator=f"{__name__}:Trusting", stateful=True)

    assert found["refuses_a_foreign_state"] == "NaN in 'calls' should raise a ParameterError"


def test_arguments_that_cannot_be_read_back_are_caught() -> None:
    found = failures("secretive", None, aggregator=f"{__name__}:Secretive")

    assert (
        "`level` must be kept in an attribute of this name by Secretive"
        in (found["survives_a_config_round_trip"])
    )
    shown = found["shows_what_you_would_type"]
    assert "Secretive object at" in shown
    assert "is no expression" in shown


def test_a_method_that_returns_no_tensor_is_told_so() -> None:
    found = failures("emptyhanded", None, aggregator=f"{__name__}:EmptyHanded")

    assert found["keeps_dtype_and_shape"] == "it returns a NoneType, no Tensor"
    assert found["handles_degenerate_rows"] == "it returns a NoneType, no Tensor"


def test_a_weighting_of_an_ordinary_class_has_no_vectors_to_be_checked() -> None:
    assert "checks_vectors_against_the_rows" not in failures("ordinary", "OrdinaryWeighting")


def test_an_expected_failure_is_accepted_only_while_it_fails() -> None:
    reason = {"is_permutation_invariant": "the first row is special"}

    expected = failures("expected", "FirstRowWeighting", properties=ALL, expected_failures=reason)
    passing = failures(
        "passing",
        "HonestWeighting",
        properties=[Property.PERMUTATION_INVARIANT],
        expected_failures=reason,
    )

    assert "is_permutation_invariant" not in expected
    assert "Remove it from expected_failures" in passing["is_permutation_invariant"]


def test_an_expected_failure_that_names_no_check_is_refused() -> None:
    with pytest.raises(ConformanceError, match="name no check: \\['misspelt'\\]"):
        failures("misspelling", "HonestWeighting", expected_failures={"misspelt": "because"})


def test_a_distribution_without_methods_cannot_pass_unnoticed() -> None:
    with pytest.raises(ConformanceError, match="provides no method: it is not installed"):
        conformance_tests("no-such-distribution")
