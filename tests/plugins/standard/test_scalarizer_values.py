"""Known values, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import jdcore
from jdcore import ParameterError, ParameterTypeError, get_scalarizer
from jdcore.scalarization import FAMO, STCH


def vector(*entries: float) -> Tensor:
    return torch.tensor(entries, dtype=torch.float64)


def value_and_gradient(scalarizer: jdcore.Scalarizer, *losses: float) -> tuple[float, list[float]]:
    given = vector(*losses).requires_grad_()
    result = scalarizer(given)
    [gradient] = torch.autograd.grad(result, [given])
    return result.item(), gradient.tolist()


def test_sums_and_means_are_what_they_say() -> None:
    assert value_and_gradient(get_scalarizer("mean"), 1, 4) == (2.5, [0.5, 0.5])
    assert value_and_gradient(get_scalarizer("sum"), 1, 4) == (5.0, [1.0, 1.0])
    constant = get_scalarizer("constant", weights=vector(3, -1))
    assert value_and_gradient(constant, 1, 4) == (-1.0, [3.0, -1.0])


def test_random_weights_are_positive_and_sum_to_one() -> None:
    scalarizer = get_scalarizer("random", generator=torch.Generator().manual_seed(0))
    _, first = value_and_gradient(scalarizer, 1, 1, 1)
    _, second = value_and_gradient(scalarizer, 1, 1, 1)

    assert min(first) > 0
    assert sum(first) == pytest.approx(1.0)
    assert first != second


def test_the_geometric_mean_pulls_at_each_loss_in_inverse_proportion() -> None:
    value, gradient = value_and_gradient(get_scalarizer("gls"), 1, 4)

    assert value == pytest.approx(2.0)
    assert gradient == pytest.approx([1.0, 0.25])  # 2 / (2 L)


def test_the_geometric_mean_of_many_small_losses_does_not_underflow() -> None:
    losses = torch.full((100,), 1e-5)

    assert get_scalarizer("geometric_mean")(losses).item() == pytest.approx(1e-5, rel=1e-4)


def test_uncertainty_weighting_is_optimal_where_variances_are_the_losses() -> None:
    scalarizer = get_scalarizer("uw", n_losses=2)
    with torch.no_grad():
        scalarizer.logits.copy_(vector(1, 4).log())
    result = scalarizer(vector(1, 4))
    result.backward()

    assert result.item() == pytest.approx(0.5 * (2 + math.log(4)))
    assert scalarizer.logits.grad.tolist() == pytest.approx([0.0, 0.0], abs=1e-6)


def test_impartial_losses_are_optimal_where_all_are_one() -> None:
    scalarizer = get_scalarizer("imtl_l", n_losses=2)
    with torch.no_grad():
        scalarizer.logits.copy_(-vector(1, 4).log())
    result = scalarizer(vector(1, 4))
    result.backward()

    assert result.item() == pytest.approx(2 + math.log(4))
    assert scalarizer.logits.grad.tolist() == pytest.approx([0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("name", ["uw", "imtl_l"])
def test_trainable_scalarizers_train_with_the_model(name: str) -> None:
    scalarizer = get_scalarizer(name, n_losses=2).double()
    parameter = torch.nn.Parameter(vector(3.0))
    optimizer = torch.optim.SGD([parameter, *scalarizer.parameters()], lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        scalarizer(torch.cat([parameter.square() + 1, 10 * parameter.square() + 1])).backward()
        optimizer.step()

    assert abs(parameter.item()) < 3.0
    assert scalarizer.logits[0] != scalarizer.logits[1]


@pytest.mark.parametrize("name", ["uw", "imtl_l"])
def test_another_number_of_losses_is_refused(name: str) -> None:
    with pytest.raises(ParameterError, match="`losses` must be 2 values"):
        get_scalarizer(name, n_losses=2)(vector(1, 2, 3))
    with pytest.raises(ParameterTypeError, match="`n_losses`"):
        get_scalarizer(name, n_losses=2.0)


def test_losses_that_fall_slowly_weigh_more_in_the_third_epoch() -> None:
    scalarizer = get_scalarizer("dwa")
    for epoch in ([[4, 4], [4, 4]], [[1, 5], [3, 3]]):  # means 4, 4 and 2, 4
        for batch in epoch:
            assert value_and_gradient(scalarizer, *batch)[1] == [1.0, 1.0]
        scalarizer.step()

    _, gradient = value_and_gradient(scalarizer, 1, 1)
    ratios = [math.exp(0.5 / 2), math.exp(1.0 / 2)]
    assert gradient == pytest.approx([2 * r / sum(ratios) for r in ratios])


def test_an_epoch_without_losses_and_another_number_of_losses_are_refused() -> None:
    scalarizer = get_scalarizer("dwa")
    with pytest.raises(ParameterError, match="before an epoch ends"):
        scalarizer.step()
    scalarizer(vector(1, 2))
    with pytest.raises(ParameterError, match=r"2 values, as in the calls before.*reset\(\)"):
        scalarizer(vector(1, 2, 3))


def test_a_loss_that_stays_zero_has_not_changed() -> None:
    scalarizer = get_scalarizer("dwa")
    for _ in range(2):
        scalarizer(vector(0, 2))
        scalarizer.step()

    assert value_and_gradient(scalarizer, 1, 1)[1] == pytest.approx([1.0, 1.0])


def test_a_loss_that_is_zero_no_longer_takes_all_the_weight() -> None:
    scalarizer = get_scalarizer("dwa")
    for losses in ((0, 1), (1, 1)):
        scalarizer(vector(*losses))
        scalarizer.step()  # type: ignore[attr-defined]  # of this scalarizer

    assert value_and_gradient(scalarizer, 3, 5) == (6.0, [2.0, 0.0])


def test_famo_weighs_the_gradients_of_logarithms() -> None:
    # By hand: z = 1/2 each, c = 1 / (1/2 + 1/8) = 1.6.
    value, gradient = value_and_gradient(get_scalarizer("famo"), 1, 4)

    assert value == pytest.approx(1.6 * 0.5 * math.log(4))
    assert gradient == pytest.approx([0.8, 0.2])
    assert sum(gradient) == pytest.approx(1.0)


def test_famo_takes_no_number_of_losses_for_a_rate() -> None:
    with pytest.raises(TypeError, match="positional argument"):
        FAMO(2)  # type: ignore[misc]


def test_famo_follows_the_update_of_its_paper() -> None:
    scalarizer = FAMO(lr=0.5, gamma=0.1)
    xi = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for before, after in (((1, 2, 3), (0.5, 1.9, 2.0)), ((0.5, 2, 2), (0.4, 1.0, 2.5))):
        scalarizer(vector(*before))
        scalarizer.update(vector(*after))
        gains = vector(*before).log() - vector(*after).log()
        [slope] = torch.autograd.grad(xi.softmax(0) @ gains, [xi])
        xi = (xi - 0.5 * (slope + 0.1 * xi)).detach().requires_grad_()

        torch.testing.assert_close(scalarizer.xi, xi.detach())


def test_famo_measures_losses_from_their_lower_bounds() -> None:
    scalarizer = FAMO(min_losses=vector(0.5, -1))

    assert value_and_gradient(scalarizer, 1.5, 0)[1] == pytest.approx([0.5, 0.5])
    with pytest.raises(ParameterError, match=r"above 0\.5, got 0\.5 for objective 0"):
        scalarizer(vector(0.5, 0))


def test_famo_refuses_updates_out_of_order_and_ignores_those_that_are_not_finite() -> None:
    scalarizer = FAMO()
    with pytest.raises(ParameterError, match="scalarized before they are updated"):
        scalarizer.update(vector(1, 2))
    scalarizer(vector(1, 2))
    with pytest.raises(ParameterError, match="`losses_after` must be 2 values"):
        scalarizer.update(vector(1, 2, 3))
    with pytest.raises(ParameterError, match="`losses_after` must be above 0"):
        scalarizer.update(vector(1, 0))
    scalarizer.update(vector(1, math.nan))
    assert scalarizer.state_dict()["xi"].numel() == 0


def test_the_chebyshev_scalarization_is_the_largest_weighted_distance() -> None:
    scalarizer = get_scalarizer("chebyshev", pref_vector=vector(1, 2), reference=vector(0, 3))

    assert value_and_gradient(scalarizer, 1, 4) == (2.0, [0.0, 2.0])
    assert value_and_gradient(get_scalarizer("chebyshev"), 1, 4) == (2.0, [0.0, 0.5])


def test_its_smooth_form_lies_above_it_by_mu_log_m_at_most() -> None:
    hard = get_scalarizer("chebyshev")
    for mu in (1e-6, 0.1, 1.0, 100.0):
        gap = STCH(mu=mu)(vector(1, 3, 2)) - hard(vector(1, 3, 2))

        assert 0.0 <= gap.item() <= mu * math.log(3) * (1 + 1e-12)
    value, gradient = value_and_gradient(STCH(mu=0.5, pref_vector=vector(1, 1)), 0, math.log(3) / 2)
    assert value == pytest.approx(0.5 * math.log(4))
    assert gradient == pytest.approx([0.25, 0.75])


def test_a_smoothing_far_below_the_losses_neither_rounds_nor_overflows() -> None:
    losses = torch.tensor([10000.0, 9999.9990], requires_grad=True)
    preferences = torch.ones(2)
    apart = (losses[0] - losses[1]).item()

    STCH(mu=1e-3, pref_vector=preferences)(losses).backward()  # quotients of ten million
    assert losses.grad is not None
    assert losses.grad[1].item() == pytest.approx(1 / (1 + math.exp(apart / 1e-3)))
    for mu in (1e-40, 1e-300):
        [gradient] = torch.autograd.grad(STCH(mu=mu, pref_vector=preferences)(losses), [losses])
        assert gradient.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("name", ["pbi", "cosmos"])
def test_preferences_that_are_all_zero_are_no_direction(name: str) -> None:
    with pytest.raises(ParameterError, match="`pref_vector` must be a direction, not zero"):
        get_scalarizer(name, pref_vector=vector(0, 0))(vector(1, 2))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_lengths_of_losses_and_preferences_stay_in_range(scale: float) -> None:
    losses, preferences = torch.tensor([3.0, 1.0]), torch.tensor([1.0, 0.0])
    pbi = get_scalarizer("pbi", pref_vector=preferences * scale)
    cosmos = get_scalarizer("cosmos", lambda_=1e3, pref_vector=preferences)

    assert pbi(losses * scale).item() == pytest.approx(8.0 * scale)
    expected = 3.0 * scale - 1e3 * 3.0 / math.sqrt(10.0)
    assert cosmos(losses * scale).item() == pytest.approx(expected)


@pytest.mark.parametrize("scale", [1e-40, 1e-45])
def test_a_gradient_out_of_range_is_infinite_and_not_nan(scale: float) -> None:
    losses = torch.tensor([1.0, 0.0]).mul_(scale).requires_grad_()
    cosmos = get_scalarizer("cosmos", pref_vector=torch.tensor([1.0, 1.0]))

    [gradient] = torch.autograd.grad(cosmos(losses), [losses])

    assert gradient.tolist() == [1.0, -math.inf]


def test_a_smoothing_of_zero_is_refused() -> None:
    with pytest.raises(ParameterError, match="`mu` must be > 0"):
        STCH(mu=0.0)


def test_leaving_the_ray_is_penalised() -> None:
    # Along (3, 4) / 5 from (1, 1): (4, 3) has d_1 = 24 / 5 and d_2 = 7 / 5.
    scalarizer = get_scalarizer("pbi", theta=2.0, pref_vector=vector(3, 4), reference=vector(1, 1))

    assert value_and_gradient(scalarizer, 5, 4)[0] == pytest.approx(24 / 5 + 2 * 7 / 5)
    value, gradient = value_and_gradient(scalarizer, 4, 5)  # on the ray
    assert value == pytest.approx(5.0)
    assert gradient == pytest.approx([0.6, 0.8])


def test_losses_in_the_direction_of_the_preferences_are_rewarded() -> None:
    scalarizer = get_scalarizer("cosmos", lambda_=2.0, pref_vector=vector(0.6, 0.8))

    assert scalarizer(vector(3, 4)).item() == pytest.approx(5.0 - 2.0)
    assert scalarizer(vector(4, -3)).item() == pytest.approx(0.0)
    assert scalarizer(vector(0, 0)).item() == 0.0


@pytest.mark.parametrize("name", ["chebyshev", "stch", "pbi", "cosmos"])
def test_a_preference_that_does_not_fit_the_losses_is_refused(name: str) -> None:
    with pytest.raises(ParameterError, match="`pref_vector` must be of length 2"):
        get_scalarizer(name, pref_vector=vector(1, 2, 3))(vector(1, 2))
