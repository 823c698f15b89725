from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jdcore import ParameterError, ParameterTypeError, get_aggregator, get_weighting, to_config
from jdcore.aggregation import GramianAggregator
from jdcore.autojac import gramian_backward


def draw(m: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, 30, generator=generator, dtype=torch.float64)


def test_weights_are_averaged_by_hand() -> None:
    weighting = get_weighting("cr_mogm", weighting=lambda g: g.diagonal(), alpha=0.75)

    assert weighting(torch.diag(torch.tensor([4.0, 8.0]))).tolist() == [4.0, 8.0]
    assert weighting(torch.diag(torch.tensor([8.0, 0.0]))).tolist() == [5.0, 6.0]


def test_the_past_may_begin_with_given_weights() -> None:
    start = torch.tensor([1.0, 0.0])
    weighting = get_weighting("cr_mogm", weighting=lambda g: g.diagonal(), initial_weights=start)

    torch.testing.assert_close(weighting(torch.eye(2)), torch.tensor([1.0, 0.1]))
    with pytest.raises(ParameterError, match="`initial_weights` must be of length 3"):
        weighting(torch.eye(3))


def test_the_state_is_that_of_both() -> None:
    def make() -> object:
        return get_aggregator("cr_mogm", weighting=get_weighting("nash_mtl"), alpha=0.5)

    one, two = make(), make()
    for seed in range(3):
        one(draw(3, seed))  # type: ignore[operator]
    state = one.state_dict()  # type: ignore[attr-defined]
    two.load_state_dict(state)  # type: ignore[attr-defined]

    assert set(state) == {"smoothed", "weighting"}
    assert set(state["weighting"]) == {"alpha", "calls"}
    assert torch.equal(one(draw(3, 9)), two(draw(3, 9)))  # type: ignore[operator]


def test_a_state_with_a_broken_inner_part_changes_nothing() -> None:
    aggregator = get_aggregator("cr_mogm", weighting=get_weighting("nash_mtl"))
    aggregator(draw(3, 0))
    before = repr(aggregator.state_dict())

    for broken in ({}, {"alpha": torch.ones(3), "calls": -1}, None):
        state = {"smoothed": torch.ones(3), "weighting": broken}
        with pytest.raises(ParameterError):
            aggregator.load_state_dict(state)
        assert repr(aggregator.state_dict()) == before


def test_input_that_is_not_finite_changes_no_state_even_if_nobody_looks_at_it() -> None:
    broken = draw(2, 0)
    broken[1, 2] = float("nan")
    for inner in (get_weighting("mean"), get_weighting("upgrad")):
        aggregator = get_aggregator("cr_mogm", weighting=inner)
        aggregator(draw(2, 1))
        before = repr(aggregator.state_dict())

        assert aggregator(broken).isnan().all()
        assert repr(aggregator.state_dict()) == before


def test_a_wrapped_scalarization_still_asks_for_no_gramian() -> None:
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    asked: list[int] = []

    class Counting(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
            asked.append(1)
            return grad

    through = Counting.apply(weight)  # type: ignore[no-untyped-call]
    gramian_backward(
        [through.sum(), through.prod()], get_weighting("cr_mogm", weighting=get_weighting("mean"))
    )

    assert len(asked) == 1


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_weights_that_depend_on_the_scale_are_averaged_in_one_unit(scale: float) -> None:
    matrix = draw(3, 0)
    aggregator = get_aggregator("cr_mogm", weighting=get_weighting("nash_mtl", max_norm=0.0))
    plain = get_weighting("nash_mtl", max_norm=0.0)(matrix @ matrix.T)
    aggregator(matrix)

    _, weights = aggregator.aggregate_blocks([matrix * scale])

    torch.testing.assert_close(weights, 0.9 * plain + 0.1 * plain / scale, rtol=1e-9, atol=0)


def test_only_weightings_are_wrapped() -> None:
    with pytest.raises(ParameterTypeError, match="`weighting` must be a Weighting"):
        get_aggregator("cr_mogm", weighting=get_aggregator("graddrop"))
    made = get_aggregator("cr_mogm", weighting=get_aggregator("mgda"))
    assert type(made.weighting.weighting) is type(get_weighting("mgda"))


def test_configurations_nest() -> None:
    config = {
        "name": "cr_mogm",
        "weighting": {"name": "periodic", "weighting": {"name": "mgda"}, "every": 3},
        "alpha": 0.5,
    }

    aggregator = get_aggregator(config)

    assert to_config(aggregator) == config
    expected = "CRMOGM(weighting=PeriodicWeighting(weighting=MGDAWeighting(solver='native'), "
    assert repr(aggregator).startswith(expected)


def test_weights_of_another_library() -> None:
    torchjd = pytest.importorskip("torchjd.aggregation")
    ours = get_weighting("cr_mogm", weighting=get_weighting("imtl_g"), alpha=0.7)
    theirs = torchjd.CRMOGMWeighting(torchjd.IMTLGWeighting(), alpha=0.7)

    for seed in range(5):
        gramian = draw(3, seed) @ draw(3, seed).T
        torch.testing.assert_close(ours(gramian), theirs(gramian))


def test_a_wrapper_of_a_plain_function_works_as_an_aggregator() -> None:
    aggregator = GramianAggregator(get_weighting("cr_mogm", weighting=lambda g: g.diagonal()))

    assert aggregator(torch.eye(2)).tolist() == [1.0, 1.0]


def test_weights_beyond_float64_are_smoothed_but_not_kept() -> None:
    rows = torch.tensor([[3.0, 1.0], [-1.0, 2.0]], dtype=torch.float64)
    fair = get_weighting("fairgrad", alpha=2.0)
    aggregator = get_aggregator("cr_mogm", weighting=fair, alpha=0.25)

    torch.testing.assert_close(aggregator(rows * 1e-300), GramianAggregator(fair)(rows * 1e-300))
    assert not len(aggregator.weighting.smoothed)
    aggregator(rows)
    kept = aggregator.weighting.smoothed
    # Beside such weights, those of longer rows are nothing.
    torch.testing.assert_close(
        aggregator(rows * 1e-300), 0.75 * GramianAggregator(fair)(rows * 1e-300)
    )
    assert aggregator.weighting.smoothed is kept
