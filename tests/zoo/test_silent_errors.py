"""Inputs that once gave wrong numbers without a word, with the right ones by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jdcore import JDCoreError
from jdcore.aggregation import (
    GramianAggregator,
    TrimmedMean,
    UPGrad,
    UPGradWeighting,
)
from jdcore.autogram import Engine
from tests.functions import Redone, RedoneOnTheParameter
from tests.zoo.specimen import error_of, gathered, rows_of


def _line(weight: float = 1.0) -> nn.Linear:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, weight)
    return layer


def _right_or_refused(engine: Engine, losses: Tensor, expected: list[list[float]]) -> None:
    try:
        got = engine.compute_gramian(losses)
    except JDCoreError:
        return
    assert torch.allclose(got, torch.tensor(expected), rtol=1e-5), got


# -- samples that move or mix ---------------------------------------------------------------------


def test_samples_that_change_places_keep_their_own_gradients() -> None:
    layer = _line()
    losses = layer(torch.tensor([[1.0], [2.0], [3.0]]))[torch.tensor([1, 0, 2])].squeeze(1)
    gramian = Engine(layer, batch_dim=0).compute_gramian(losses)
    assert torch.equal(gramian.diag(), torch.tensor([4.0, 1.0, 9.0]))


def test_nothing_is_remembered_of_how_a_graph_mixed_before() -> None:
    layer = _line()
    engine = Engine(layer, batch_dim=0)
    x = torch.tensor([[1.0], [2.0], [3.0], [4.0]])

    def pooled(owners: list[int]) -> Tensor:
        return torch.zeros(2).index_add(0, torch.tensor(owners), layer(x).squeeze(1))

    _right_or_refused(engine, pooled([0, 0, 1, 1]), [[9.0, 21.0], [21.0, 49.0]])
    _right_or_refused(engine, pooled([0, 0, 0, 1]), [[36.0, 24.0], [24.0, 16.0]])
    _right_or_refused(engine, pooled([1, 0, 0, 0]), [[81.0, 9.0], [9.0, 1.0]])


def test_losses_over_the_batch_after_losses_of_samples() -> None:
    layer = _line()
    engine = Engine(layer, batch_dim=0)
    x = torch.tensor([[1.0], [2.0]])
    assert torch.equal(
        engine.compute_gramian(layer(x).squeeze(1)), torch.tensor([[1.0, 2.0], [2.0, 4.0]])
    )
    scores = layer(x) @ x.T  # [2, 2], the logits of a contrastive loss
    _right_or_refused(engine, scores.sum(0), [[9.0, 18.0], [18.0, 36.0]])


def test_another_roll_than_before() -> None:
    layer = _line()
    engine = Engine(layer, batch_dim=0)
    x = torch.tensor([[1.0], [2.0], [4.0]])

    def rolled(by: int) -> Tensor:
        hidden = layer(x)
        return (hidden * x + hidden.roll(by, 0)).squeeze(1)

    # Gradients x² plus that of the sample before: 1, 4, 16 plus 1, 2, 4 in other orders.
    for by, rows in ((0, [2.0, 6.0, 20.0]), (1, [5.0, 5.0, 18.0]), (2, [3.0, 8.0, 17.0])):
        _right_or_refused(engine, rolled(by), [[a * b for b in rows] for a in rows])


def test_a_gate_that_opens_later() -> None:
    layer = _line()
    engine = Engine(layer, batch_dim=0)
    x = torch.tensor([[1.0], [2.0], [4.0]])
    for gate, rows in ((0.0, [1.0, 2.0, 4.0]), (1.0, [5.0, 3.0, 6.0])):
        hidden = layer(x)
        losses = (hidden + gate * hidden.roll(1, 0)).squeeze(1)
        _right_or_refused(engine, losses, [[a * b for b in rows] for a in rows])


def test_tasks_that_cancel_do_not_hide_what_moved() -> None:
    layer = _line()
    loss = layer(torch.tensor([[1.0], [2.0], [4.0]])).flip(0).squeeze(1)
    losses = torch.stack([loss, -loss], 1)
    gramian = Engine(layer, batch_dim=0).compute_gramian(losses)
    rows = torch.tensor([[4.0, -4.0], [2.0, -2.0], [1.0, -1.0]])
    expected = torch.einsum("ak,bl->aklb", rows, rows)
    assert torch.equal(gramian, expected)


def test_an_outlier_does_not_hide_that_others_mix() -> None:
    layer = _line()
    hidden = layer(torch.tensor([[1.0], [2.0], [4.0], [1e6]])).squeeze(1)
    losses = torch.stack([hidden[0] + hidden[1], hidden[1], hidden[2], hidden[3]])
    try:
        gramian = Engine(layer, batch_dim=0).compute_gramian(losses)
    except JDCoreError:
        return
    rows = torch.tensor([3.0, 2.0, 4.0, 1e6])
    assert torch.equal(gramian, rows[:, None] * rows)


@pytest.mark.parametrize("b", [2, 4, 8, 16, 32])
def test_one_loss_that_reaches_another_sample(b: int) -> None:
    layer = _line()
    hidden = layer(torch.arange(1.0, b + 1)[:, None]).squeeze(1)
    losses = hidden.clone()
    losses[0] = hidden[0] - hidden[1]
    rows = [-1.0, *map(float, range(2, b + 1))]
    _right_or_refused(Engine(layer, batch_dim=0), losses, [[p * q for q in rows] for p in rows])


# -- hooks ----------------------------------------------------------------------------------------

X = torch.tensor([[1.0, 5.0], [2.0, -7.0]])


def test_hooks_of_parameters_change_the_rows() -> None:
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.register_hook(lambda g: g * torch.tensor([1.0, 0.0]))
    for batch_dim in (0, None):
        engine = Engine(layer, batch_dim=batch_dim)
        _right_or_refused(engine, layer(X).squeeze(1), [[1.0, 2.0], [2.0, 4.0]])


def test_hooks_of_parameters_that_are_not_linear_act_on_each_row() -> None:
    """Clipping by value: on each row, which no gradient of a sum can tell."""
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.register_hook(lambda g: g.clamp(-3, 3))
    for batch_dim in (0, None):
        engine = Engine(layer, batch_dim=batch_dim)
        _right_or_refused(engine, layer(X).squeeze(1), [[10.0, -7.0], [-7.0, 13.0]])


@pytest.mark.filterwarnings("ignore::jdcore.RowByRowWarning")
@pytest.mark.parametrize("batch_dim", [0, None])
def test_hooks_of_activations_that_read_values(batch_dim: int | None) -> None:
    layer, seen = nn.Linear(2, 1, bias=False), []
    hidden = layer(X)
    hidden.register_hook(lambda g: seen.append(float(g.sum())))
    _right_or_refused(
        Engine(layer, batch_dim=batch_dim), hidden.squeeze(1), [[26.0, -33.0], [-33.0, 53.0]]
    )


@pytest.mark.parametrize("batch_dim", [0, None])
def test_retained_gradients_are_those_of_the_weighted_losses(batch_dim: int | None) -> None:
    layer = nn.Linear(2, 1, bias=False)
    hidden = layer(X)
    hidden.retain_grad()
    weights = torch.tensor([2.0, -3.0])
    Engine(layer, batch_dim=batch_dim).backward(hidden.squeeze(1), lambda _: weights)
    assert torch.equal(hidden.grad, weights[:, None])


@pytest.mark.filterwarnings("ignore::jdcore.RowByRowWarning")
@pytest.mark.parametrize("batch_dim", [0, None])
def test_stored_gradients_of_activations_are_ordinary_tensors(batch_dim: int | None) -> None:
    layer, stored = nn.Linear(2, 1, bias=False), []
    hidden = layer(X)
    hidden.register_hook(stored.append)
    try:
        Engine(layer, batch_dim=batch_dim).backward(hidden.squeeze(1), torch.diag)
    except JDCoreError:
        return
    assert stored
    assert all(g.clone().shape[-2:] == (2, 1) for g in stored), "vmap is over"
    assert all(isinstance(g.sum().item(), float) for g in stored)


# -- engines and models that changed since --------------------------------------------------------


class _Lora(nn.Module):
    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner.requires_grad_(False)
        self.down = nn.Parameter(torch.ones(1, 2))
        self.up = nn.Parameter(torch.ones(1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x @ self.down.T @ self.up.T


def _now_right(engine: Engine, model: nn.Module) -> None:
    losses = model(X).squeeze(1)
    rows = rows_of(losses, [p for p in model.parameters() if p.requires_grad])
    assert error_of(engine.compute_gramian(losses), rows @ rows.T) <= 1e-6
    assert rows.count_nonzero() > 0


def _inject_lora(model: nn.Sequential) -> None:
    model[0] = _Lora(model[0])


def _replace_parameter(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(torch.tensor([[1.0, 3.0]]))


def _replace_layer(model: nn.Sequential) -> None:
    model[0] = nn.Linear(2, 1)


def _assign_state(model: nn.Sequential) -> None:
    state = {name: torch.ones_like(value) for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def _add_layer(model: nn.Sequential) -> None:
    model.append(nn.Linear(1, 1))


def _freeze(model: nn.Sequential) -> None:
    model[0].bias.requires_grad_(False)


CHANGES = [_inject_lora, _replace_parameter, _replace_layer, _assign_state, _add_layer, _freeze]


@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("change", CHANGES)
def test_an_engine_sees_what_became_of_its_modules(
    change: Callable[[nn.Sequential], None], batch_dim: int | None
) -> None:
    model = nn.Sequential(nn.Linear(2, 1))
    engine = Engine(model, batch_dim=batch_dim)
    _now_right(engine, model)
    change(model)
    _now_right(engine, model)


@pytest.mark.parametrize("batch_dim", [0, None])
def test_an_engine_of_a_model_is_not_one_of_its_copy(batch_dim: int | None) -> None:
    model = nn.Sequential(nn.Linear(2, 1))
    engine = Engine(model, batch_dim=batch_dim)
    other = copy.deepcopy(model)
    with pytest.raises(JDCoreError):
        engine.compute_gramian(other(X).squeeze(1))
    with pytest.raises(JDCoreError):
        engine.backward(other(X).squeeze(1), torch.diag)
    assert all(p.grad is None for p in other.parameters())
    _now_right(Engine(other, batch_dim=batch_dim), other)


def test_a_copy_of_an_engine_goes_with_the_copy_of_the_model() -> None:
    model = nn.Sequential(nn.Linear(2, 1))
    other, engine = copy.deepcopy((model, Engine(model, batch_dim=0)))
    _now_right(engine, other)


@pytest.mark.parametrize("batch_dim", [0, None])
def test_an_engine_of_nothing_has_no_gramian(batch_dim: int | None) -> None:
    layer = nn.Linear(2, 1)
    for modules in ((), (nn.ReLU(),)):
        with pytest.raises(JDCoreError):
            Engine(*modules, batch_dim=batch_dim).compute_gramian(layer(X).squeeze(1))


def test_an_engine_may_be_younger_than_the_graph() -> None:
    layer = nn.Linear(2, 1, bias=False)
    losses = layer(X).squeeze(1)
    gramian = Engine(layer, batch_dim=0).compute_gramian(losses)
    assert torch.equal(gramian, torch.tensor([[26.0, -33.0], [-33.0, 53.0]]))


def test_a_forward_that_was_replaced() -> None:
    layer = nn.Linear(2, 1, bias=False)
    engine = Engine(layer, batch_dim=0)
    layer.forward = lambda x: 3 * nn.functional.linear(x, layer.weight)  # type: ignore[method-assign]
    losses = layer(torch.tensor([[1.0, 0.0], [2.0, 0.0]])).squeeze(1)
    assert torch.equal(engine.compute_gramian(losses), torch.tensor([[9.0, 18.0], [18.0, 36.0]]))


def test_models_stay_as_they_were() -> None:
    """Nothing is attached: no hooks, no attributes, nothing in copies and pickles."""
    layer = nn.Linear(2, 1)
    before = {k: copy.copy(v) for k, v in vars(layer).items()}
    engine = Engine(layer, batch_dim=0)
    engine.backward(layer(X).squeeze(1), torch.diag)
    assert {k: len(v) if hasattr(v, "__len__") else v for k, v in vars(layer).items()} == {
        k: len(v) if hasattr(v, "__len__") else v for k, v in before.items()
    }
    assert not any(p._backward_hooks for p in layer.parameters())


# -- functions that differentiate by themselves ---------------------------------------------------


@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("function", [Redone, RedoneOnTheParameter])
def test_passes_inside_of_a_backward_count_once(
    function: type[torch.autograd.Function], batch_dim: int | None
) -> None:
    model = nn.ParameterDict({"w": nn.Parameter(torch.tensor([2.0, 3.0]))})
    engine = Engine(model, batch_dim=batch_dim)

    def losses() -> Tensor:
        return function.apply(X, model["w"]).sum(1)

    rows = torch.tensor([[1.0, 5.0], [2.0, -7.0]])
    _right_or_refused(engine, losses(), (rows @ rows.T).tolist())
    weights = torch.tensor([1.0, 0.5])
    engine.backward(losses(), lambda _: weights)
    assert torch.equal(model["w"].grad, weights @ rows)


class _Reversible(torch.autograd.Function):
    """Writes to ``.grad`` in its own backward, as reversible blocks do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer, ctx.x = layer, x.detach()
        with torch.no_grad():
            return x + layer(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        with torch.enable_grad():
            x = ctx.x.detach().requires_grad_()
            ctx.layer(x).backward(grad)
        return grad + x.grad, None


@pytest.mark.parametrize("batch_dim", [0, None])
def test_blocks_that_write_gradients_by_themselves_are_right_or_refused(
    batch_dim: int | None,
) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1))
    engine = Engine(model, batch_dim=batch_dim)

    def losses() -> Tensor:
        return model[2](_Reversible.apply(model[0](X), model[1])).squeeze(1)

    rows = []
    for i in range(2):
        losses()[i].backward()
        rows.append(gathered(list(model.parameters())))
        model.zero_grad()
    expected = torch.stack(rows)
    try:
        gramian = engine.compute_gramian(losses())
    except JDCoreError:
        assert all(p.grad is None for p in model.parameters()), "refused, and left gradients"
        return
    assert all(p.grad is None for p in model.parameters())
    assert error_of(gramian, expected @ expected.T) <= 1e-6


@pytest.mark.filterwarnings("ignore::jdcore.RowByRowWarning")
@pytest.mark.parametrize("batch_dim", [0, None])
def test_equilibrium_models_with_a_hook_that_solves(batch_dim: int | None) -> None:
    """DEQ: the gradient at the fixed point is solved for by passes inside of a hook."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 3).double()
    nn.init.orthogonal_(layer.weight, gain=0.4)
    inputs = torch.randn(4, 3, dtype=torch.float64)
    engine = Engine(layer, batch_dim=batch_dim)

    def step(z: Tensor) -> Tensor:
        return (layer(z) + inputs).tanh()

    def losses() -> Tensor:
        with torch.no_grad():
            z = torch.zeros_like(inputs)
            for _ in range(60):
                z = step(z)
        fixed = z.clone().requires_grad_()
        again, z = step(fixed), step(z)

        def solve(grad: Tensor) -> Tensor:
            g = grad
            for _ in range(60):
                g = grad + torch.autograd.grad(again, fixed, g, retain_graph=True)[0]
            return g

        z.register_hook(solve)
        return z.square().sum(1)

    rows = rows_of(losses(), list(layer.parameters()))
    gramian = engine.compute_gramian(losses())
    assert error_of(gramian, rows @ rows.T) <= 1e-12
    weights = torch.tensor([1.0, -1.0, 0.5, 2.0], dtype=torch.float64)
    engine.backward(losses(), lambda _: weights)
    assert error_of(gathered(list(layer.parameters())), weights @ rows) <= 1e-12


# -- aggregators where weightings are meant -------------------------------------------------------


@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("wrap", [lambda a: a, lambda a: GramianAggregator(a.weighting)])
def test_the_weighting_of_an_aggregator_is_used(
    wrap: Callable[[Any], Any], batch_dim: int | None
) -> None:
    layer = nn.Linear(2, 1, bias=False)
    engine = Engine(layer, batch_dim=batch_dim)
    weights = engine.backward(layer(X).squeeze(1), wrap(UPGrad()))
    expected = UPGradWeighting()(torch.tensor([[26.0, -33.0], [-33.0, 53.0]]))
    assert torch.allclose(weights, expected.to(weights))


@pytest.mark.parametrize("aggregator", [TrimmedMean(1)], ids=["trimmed_mean"])
def test_methods_of_matrices_are_no_weightings(aggregator: Any) -> None:
    layer = nn.Linear(2, 1, bias=False)
    with pytest.raises(JDCoreError):
        Engine(layer, batch_dim=0).backward(layer(X).squeeze(1), aggregator)
    assert layer.weight.grad is None
