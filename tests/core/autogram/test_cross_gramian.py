"""The cross-Gramian of two batches, against rows by plain backward passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jdcore import ParameterError, ParameterTypeError
from jdcore.aggregation import CrossGramianWeighting, GramianSource, LossWeighting, weigh
from jdcore.autogram import Engine
from jdcore.autojac import jac
from tests.core.autogram.oracle import explicit_jacobian, randn, relative_error


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "convolution":
        return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 3))
    return nn.Sequential(nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 3))


def losses_of(model: nn.Module, kind: str, seed: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (size, 1, 4, 4) if kind == "convolution" else (size, 16)
    inputs = torch.randn(shape, generator=generator, dtype=torch.float64)
    return model(inputs).square().mean(dim=0)


def rows(losses: Tensor, model: nn.Module) -> Tensor:
    jacobians = jac(losses, list(model.parameters()), retain_graph=True)
    return torch.cat([jacobian.flatten(1) for jacobian in jacobians], dim=1)


@pytest.mark.parametrize("kind", ["dense", "convolution"])
def test_it_is_the_product_of_the_two_jacobians(kind: str) -> None:
    model = model_of(kind).double()
    one, two = losses_of(model, kind, 1, 6), losses_of(model, kind, 2, 4)

    cross = Engine(model, batch_dim=None).cross_gramian(one, two)

    torch.testing.assert_close(cross, rows(one, model) @ rows(two, model).T)
    assert all(parameter.grad is None for parameter in model.parameters())
    one.sum().backward()  # the graphs are still there
    two.sum().backward()


def test_the_two_batches_may_differ_in_their_number_of_losses() -> None:
    model = model_of("dense").double()
    one, two = losses_of(model, "dense", 1, 6), losses_of(model, "dense", 2, 4)[:2]

    cross = Engine(model, batch_dim=None).cross_gramian(one, two)

    assert cross.shape == (3, 2)
    torch.testing.assert_close(cross, rows(one, model) @ rows(two, model).T)


def test_it_is_an_unbiased_estimate_where_the_gramian_is_not() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    engine = Engine(model, batch_dim=None)
    generator = torch.Generator().manual_seed(0)
    crosses, grams = [], []
    for _ in range(400):
        # The gradient of each loss is its noise: the expected one is zero.
        noise = torch.randn(2, 1, 1, generator=generator, dtype=torch.float64)
        one, two = (model(sample).flatten() for sample in noise)
        crosses.append(engine.cross_gramian(one, two))
        grams.append(engine.compute_gramian(one))

    assert abs(float(torch.stack(crosses).mean())) < 0.2
    assert float(torch.stack(grams).mean()) > 0.8


def test_weights_of_it_and_the_losses_of_a_third_batch_make_an_update() -> None:
    class RowSums(CrossGramianWeighting):
        def compute(self, gramian: Any) -> Any:
            return gramian.sum(axis=1)

    model = model_of("dense").double()
    batches = [losses_of(model, "dense", seed, 5) for seed in range(3)]

    weights = RowSums()(Engine(model, batch_dim=None).cross_gramian(*batches[:2]))
    batches[2].backward(weights)

    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    expected = weights @ rows(losses_of(model, "dense", 2, 5), model)
    torch.testing.assert_close(gradient, expected)


class _Sentences(nn.Module):
    """A table that is also the output layer, a weight that is derived, and a fused recurrence."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.scale = nn.Embedding(7, 4), nn.Parameter(torch.rand(4))
        self.recurrent = nn.LSTM(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        states = self.recurrent(self.table(x) * self.scale.exp())[0]
        return (states @ self.table.weight.T).logsumexp(2).mean(1)


def _sentences(model: nn.Module, seed: int, size: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return model(torch.randint(0, 7, (size, length), generator=generator))


def _images(model: nn.Module, seed: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return model(torch.randn(size, 2, 6, 6, generator=generator, dtype=torch.float64)).sum(1).sin()


def _convolutions() -> nn.Module:
    layers = [nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Conv2d(4, 3, 3, stride=2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(3, 2))


def _checked(engine: Engine, one: Tensor, two: Tensor, model: nn.Module) -> None:
    cross = engine.cross_gramian(one, two)
    torch.testing.assert_close(cross, rows(one, model) @ rows(two, model).T, rtol=0, atol=1e-12)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("sizes", [(3, 3), (4, 2), (1, 3), (1, 1)])
def test_batches_of_one_loss_for_each_sample(
    sizes: tuple[int, int], recwarn: pytest.WarningsRecorder
) -> None:
    torch.manual_seed(0)
    model, sentences = _convolutions().double(), _Sentences().double()
    for _ in range(2):  # the second time, where the samples are is known
        one, two = (_images(model, seed, size) for seed, size in enumerate(sizes))
        _checked(Engine(model, batch_dim=0), one, two, model)
    for lengths in ((3, 3), (3, 5)):
        one, two = (
            _sentences(sentences, seed, size, length)
            for seed, (size, length) in enumerate(zip(sizes, lengths, strict=True))
        )
        _checked(Engine(sentences, batch_dim=-1), one, two, sentences)
    assert not recwarn.list


def test_batches_that_go_through_other_layers_of_the_same_shape() -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 1)]).double()
    head, x = model[2], torch.randn(3, 5, dtype=torch.float64)

    def losses(*layers: int) -> Tensor:
        hidden = x * (1 + len(layers))
        for layer in layers:
            hidden = model[layer](hidden).tanh()
        return head(hidden)[:, 0].square()

    engine = Engine(model, batch_dim=0)
    for one, two in (((0,), (1,)), ((0, 1), (1, 0)), ((0, 1), (1,)), ((0, 1), (0, 1))):
        _checked(engine, losses(*one), losses(*two), model)
    # Of the weight as it is, and transposed.
    square = nn.Parameter(torch.randn(5, 5, dtype=torch.float64))
    holder = nn.ParameterList([square])
    one, two = ((x @ weight).square().sum(1) for weight in (square, square.T))
    _checked(Engine(holder, batch_dim=0), one, two, holder)


def test_batches_without_a_parameter_in_common_have_nothing_to_do_with_one_another() -> None:
    model = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1)])
    one, two = (layer(torch.ones(size, 2))[:, 0] for layer, size in zip(model, (2, 3), strict=True))
    assert torch.equal(Engine(model, batch_dim=0).cross_gramian(one, two), torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        (
            torch.ones(3, 1, requires_grad=True),
            ParameterError,
            "`other` must be a vector of losses",
        ),
        ([1.0], ParameterTypeError, "`other` must be a floating Tensor"),
        (torch.tensor([1, 2]), ParameterTypeError, "of a real floating dtype"),
    ],
)
def test_unusable_losses_are_refused(other: Any, error: type[Exception], message: str) -> None:
    model = model_of("dense").double()
    losses = losses_of(model, "dense", 1, 6)

    with pytest.raises(error, match=message):
        Engine(model, batch_dim=None).cross_gramian(losses, other)


@pytest.mark.parametrize("batch_dim", [0, None])
def test_a_batch_of_another_model_is_refused(batch_dim: int | None) -> None:
    """Its products with the other one would be zero."""
    model, copy = model_of("dense").double(), model_of("dense").double()
    engine = Engine(model, batch_dim=batch_dim)
    own, foreign = (losses_of(net, "dense", 1, 6) for net in (model, copy))
    for pair in ((own, foreign), (foreign, own)):
        with pytest.raises(ParameterError, match=r"`modules` .* got nothing behind"):
            engine.cross_gramian(*pair)


def test_one_batch_twice_is_refused() -> None:
    model = model_of("dense").double()
    losses = losses_of(model, "dense", 1, 6)

    with pytest.raises(ParameterError, match="must be distinct tensors"):
        Engine(model, batch_dim=None).cross_gramian(losses, losses)


def test_an_engine_with_one_batch_refuses_a_weighting_of_two_and_names_the_call() -> None:
    class RowSums(CrossGramianWeighting):
        def compute(self, gramian: Any) -> Any:
            return gramian.sum(axis=1)

    model = model_of("dense").double()
    losses = losses_of(model, "dense", 1, 6)

    with pytest.raises(ParameterError, match=r"`second` must be given.*engine\.cross_gramian"):
        Engine(model, batch_dim=None).backward(losses, RowSums())
    assert all(parameter.grad is None for parameter in model.parameters())
    source = GramianSource.of_cross(torch.ones(2, 2))
    assert weigh(RowSums(), source).tolist() == [2.0, 2.0]


def test_losses_reach_a_weighting_of_the_engine() -> None:
    class Losses(LossWeighting):
        def compute_with(self, gramian: Any, losses: Any) -> Any:
            return losses.copy()

    model = model_of("dense").double()
    losses = losses_of(model, "dense", 1, 6)

    weights = Engine(model, batch_dim=None).backward(losses, Losses())

    torch.testing.assert_close(weights, losses.detach())


@pytest.mark.parametrize("first", [True, False])
def test_a_bias_that_one_batch_uses_alone_has_no_product(first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 5).double()
    x, y = torch.randn(2, 4, 5, dtype=torch.float64)
    losses = [layer(x).square().sum(1), nn.functional.linear(y, layer.weight).square().sum(1)]
    one, two = losses if first else losses[::-1]

    cross = Engine(layer, batch_dim=0).cross_gramian(one, two)

    expected = [torch.autograd.grad(loss, layer.weight, retain_graph=True)[0] for loss in one]
    others = [torch.autograd.grad(loss, layer.weight, retain_graph=True)[0] for loss in two]
    of_weights = torch.stack(expected).flatten(1) @ torch.stack(others).flatten(1).T
    torch.testing.assert_close(cross, of_weights)


def test_a_scalar_that_is_derived_from_a_parameter() -> None:
    net, scale = nn.Linear(3, 2), nn.Parameter(torch.tensor(0.3))
    model = nn.ParameterList([*net.parameters(), scale])

    def losses(x: Tensor) -> Tensor:
        return (net(x) * scale.exp()).square().sum(1)

    one, other = losses(randn(4, 3)), losses(randn(5, 3) + 1.0)
    rows = [explicit_jacobian(batch, list(model)) for batch in (one, other)]
    got = Engine(model, batch_dim=0).cross_gramian(one, other)
    assert relative_error(got, rows[0] @ rows[1].T) < 1e-12


class _StopsAtNaN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        if grads[0].isnan().any():
            raise ValueError("NaN")
        return grads[0]


@pytest.mark.filterwarnings("ignore::jdcore.RowByRowWarning")
def test_batches_whose_samples_cannot_be_shown() -> None:
    model = nn.Sequential(nn.Linear(16, 5), nn.Linear(5, 3))
    engine, parameters = Engine(model, batch_dim=0), list(model.parameters())
    generator = torch.Generator().manual_seed(0)
    one, two = (
        model[1](_StopsAtNaN.apply(model[0](torch.randn(size, 16, generator=generator))).tanh())
        .square()
        .sum(1)
        for size in (4, 4)
    )
    expected = explicit_jacobian(one, parameters) @ explicit_jacobian(two, parameters).T
    assert relative_error(engine.cross_gramian(one, two), expected) < 1e-12
